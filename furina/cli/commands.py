"""The list of commands, in the order in which a newcomer needs them."""

from furina.cli.adapters import Assets, Combine, Export, Merge, Methods
from furina.cli.analysis import Analyse
from furina.cli.data import Data
from furina.cli.parsing import Command
from furina.cli.runs import Fit, Run
from furina.cli.scoring import Evaluate, Latency, Report

_ORDERED: tuple[type[Command], ...] = (
    *(Assets, Data, Methods, Fit, Evaluate, Merge, Export, Combine, Latency, Analyse, Report, Run),
)
COMMANDS = {command.name(): command for command in _ORDERED}
