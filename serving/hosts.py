"""By which names the page may be called. A name that another site has pointed at this computer (DNS
rebinding) would else let that site's scripts read all that is served here."""

import ipaddress
import re
import socket

NAME = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?)(?::(?P<port>[0-9]{1,5}))?")
ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<host>[^/]+)")
DEFAULT_PORTS = {"http": 80, "https": 443}
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def split_host(text: str) -> tuple[str, int | None]:
    """A name or an address, and the port if there is one. Raises ValueError."""
    match = NAME.fullmatch(text.lower())
    if not match or int(match["port"] or 0) > 65535:
        raise ValueError(f"{text!r} is no NAME or NAME:PORT")
    return match["name"].strip("[]"), int(match["port"]) if match["port"] else None


def is_host(text: str) -> bool:
    try:
        split_host(text)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Does this address let nobody in but this computer?"""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Hosts:
    """The names and addresses that the page answers to.

    host     that it is served on; where that is not loopback, also the name of this computer and the address
             that a request came to
    allowed  others, NAME (any port) or NAME:PORT
    """

    def __init__(self, host: str, port: int, allowed: list[str]):
        self.port, self.is_open = port, not is_loopback(host)
        self.names = {*LOCAL_NAMES, host.strip("[]").lower()} - {"0.0.0.0", "::"}
        if self.is_open:
            self.names |= {own := socket.gethostname().lower(), f"{own}.local"}
        self.allowed = {split_host(text) for text in allowed}

    def knows(self, text: str, address: str, default_port: int = 80) -> bool:
        """Is this the page, as NAME or NAME:PORT? address: of this computer, that the request came to."""
        try:
            name, port = split_host(text)
        except ValueError:
            return False
        port = default_port if port is None else port
        address = address.lower().removeprefix("::ffff:")  # IPv4, on a socket for both
        if (name, None) in self.allowed or (name, port) in self.allowed:
            return True
        return port == self.port and (name in self.names or (self.is_open and name == address))

    def knows_origin(self, text: str, address: str) -> bool:
        match = ORIGIN.fullmatch(text)
        return bool(match) and self.knows(match["host"], address, DEFAULT_PORTS[match["scheme"]])
