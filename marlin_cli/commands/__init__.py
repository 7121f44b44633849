"""The subcommands, one a file: options to settings, one library call, one rendering."""
