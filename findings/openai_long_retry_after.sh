#!/usr/bin/env bash
# The openai client gives up at once where a busy server's Retry-After is above 120 seconds, whatever max_retries says.
#
# A 429 is tried twice more by default, after as many seconds as Retry-After tells. Above 120 the client neither waits so long
# nor waits less: it raises RateLimitError after the first try, and says why at the level of debugging alone. So a server that
# is honest about a long queue has its clients fail, where one that says less, or nothing, is asked again.
# Seen with openai 3.57.0: tries by Retry-After: "0.1" 3, none 3, "121" 1, "600" 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "openai==3.57.0"
"$folder/venv/bin/python" - <<'PYTHON'
import http.server
import threading

import openai

tries = []
wait = None


class Busy(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        tries.append(self.path)
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b'{"error": {"message": "busy"}}'
        self.send_response(429)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if wait is not None:
            self.send_header("Retry-After", wait)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none")
found = {}
for wait in ("0.1", None, "121", "600"):
    tries.clear()
    try:
        client.completions.create(model="any", prompt="some text")
    except openai.RateLimitError:
        found[wait] = len(tries)
print("openai", openai.__version__, "| tries by Retry-After:", found)
assert found == {"0.1": 3, None: 3, "121": 1, "600": 1}, "it behaves otherwise now"
PYTHON
