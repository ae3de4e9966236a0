"""This host's network interfaces and their addresses."""

import fcntl
import ipaddress
import socket
import struct
from contextlib import suppress
from pathlib import Path

LOOPBACK = "lo"  # the interface by which a host reaches itself alone

_IPV6 = Path("/proc/net/if_inet6")
_SIOCGIFADDR = 0x8915  # of linux/sockios.h: the IPv4 address of an interface


def own_addresses() -> list[str]:
    """Return the addresses of this host by which others may reach it, IPv4 first."""
    found = [ipaddress.ip_address(address) for _, address in _addresses()]
    fit = [address for address in found if not (address.is_loopback or address.is_link_local)]
    return [str(address) for address in sorted(fit, key=lambda address: address.version)]


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has an address, None where this host does not have it."""
    wanted = ipaddress.ip_address(address.removeprefix("::ffff:"))
    return next((name for name, own in _addresses() if ipaddress.ip_address(own) == wanted), None)


def _addresses() -> list[tuple[str, str]]:
    """Return the names of all interfaces with each of their addresses."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append((name, socket.inet_ntoa(answer[20:24])))
    with suppress(OSError):  # a host without IPv6
        for line in _IPV6.read_text().splitlines():
            digits, _, _, _, _, name = line.split()
            found.append((name, str(ipaddress.ip_address(bytes.fromhex(digits)))))
    return found
