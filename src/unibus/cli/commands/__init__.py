"""One module a command, found by being here: its `register(app)` adds it to the typer application.

A command is an async or plain function, wrapped by `unibus.cli.run.command`, which turns errors into one line and an exit
code. What it works on comes from `unibus.cli.target`, what it prints goes through `unibus.cli.output`.
"""
