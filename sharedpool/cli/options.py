"""Options that several commands share, and the `BrokerSettings` that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from sharedpool.broker.launch.run import control_dsn
from sharedpool.broker.settings import OPTIONS, BrokerSettings, Kind
from sharedpool.discovery import address as addresses
from sharedpool.errors import ConfigError
from sharedpool.validate import parse_seconds

F = TypeVar("F", bound=Callable[..., Any])


class Seconds(click.ParamType[float]):
    """A positive number of seconds."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            return parse_seconds(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


SECONDS = Seconds()
_TYPES: dict[Kind, click.ParamType[Any]] = {
    Kind.COUNT: click.IntRange(min=1, max=2**31 - 1),
    Kind.SECONDS: SECONDS,
    Kind.TEXT: click.STRING,
}


def broker_options(*, run: bool = False) -> Callable[[F], F]:
    """Return a decorator that adds the options of a broker, or only those of `sharedpool run`."""

    def add(command: F) -> F:
        for option in reversed(OPTIONS):
            if run and option.broker_only:
                continue
            # To click an explicit default of None would satisfy `required`.
            default = {} if option.default is None else {"default": option.default}
            command = click.option(
                option.flag,
                type=_TYPES[option.kind],
                metavar=option.metavar or option.kind.value,
                **default,
                show_default=option.unset or option.default is not None,
                required=option.required,
                envvar=option.variable,
                show_envvar=True,
                help=option.help,
            )(command)
        return command

    return add


def settings_from(
    given: Mapping[str, Any], address: str, source: str, **others: Any
) -> BrokerSettings:
    """Return the settings of a broker at `address`; `given` are its options by name.

    `source` names the option that gave the address. `others` are settings that are no options.
    Raise click's usage error for a wrong value.
    """
    values = {each.field: given[each.name] for each in OPTIONS if given.get(each.name) is not None}
    try:
        values["address"] = addresses.check_address(address, source)
        values["dsn"] = control_dsn(given["dsn"])
        if "metrics" in values:
            addresses.check_metrics_address(values["metrics"], "--metrics")
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    return BrokerSettings(**values, **others)
