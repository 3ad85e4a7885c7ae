"""The `sharedpool` command. A subcommand's module is imported only when that subcommand is used."""

from __future__ import annotations

import click

from sharedpool.loading import load

# By the command's name: its module, and after a colon the function if it has another name.
_COMMANDS = {
    "broker": "broker",
    "check-config": "broker:check_config",
    "run": "run",
    "status": "status",
    "who": "who",
    "top": "top",
    "pause": "admin",
    "resume": "admin",
    "set": "admin:set_",
    "drain": "admin",
    "kill": "admin",
    "reconnect": "admin",
    "init-db": "init_db:init_db",
    "demo": "demo.command:demo",
    "completion": "completion",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command = getattr(load(f"sharedpool.cli.{module}"), name or cmd_name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sharedpool", prog_name="sharedpool")
def main() -> None:
    """One PostgreSQL connection limit, shared by every worker process."""
