"""The exit statuses of all programs, in one table: a script or a scheduler decides by them what comes next."""

TYPE_CHECKING = False  # as in typing, whose import would come before a program can take an interrupt

if TYPE_CHECKING:
    from typing import Final

FINISHED: "Final" = 0  # all is done; of a rank also: stopped as asked, with a checkpoint
FAILED: "Final" = 1  # a rank died, or lost contact with another: a restart may cure that
REFUSED: "Final" = 2  # the config, the data or the machine is not as it must be: a restart cures nothing
STOPPED: "Final" = 3  # of `cosmos-scale launch`: stopped as asked, with a checkpoint; the same command goes on
INTERRUPTED: "Final" = 130  # Ctrl-C, of a run the second one: ended at once, as shells number it
CLOSED_PIPE: "Final" = 141  # the reader of the output has left, as shells number it
