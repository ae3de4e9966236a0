"""The command line `cosmos-scale`, a file a command."""

from cosmos_scale.interrupt import tell_interrupts

tell_interrupts("cosmos-scale")
