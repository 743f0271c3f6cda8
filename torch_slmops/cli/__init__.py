"""The command line: `torch-slmops COMMAND` or `python -m torch_slmops COMMAND`.

One module per command. Each has `add(commands, common)`, which adds its parser, and a function
`run(args, screen)` that returns the exit code. `main.COMMANDS` lists the modules.
"""
