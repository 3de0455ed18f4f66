"""The command line: `mxgpt COMMAND`."""
