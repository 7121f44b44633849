"""Where the program begins, as `marlin` and as `python -m marlin_cli`: Ctrl-C ends it without a word while it is imported."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` listens

from marlin_cli.cli import main

if __name__ == "__main__":
    main()
