"""Commands: argv to config to one call to an exit code."""
