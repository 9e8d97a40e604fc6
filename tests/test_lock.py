"""requirements.txt leaves out versions with known holes; requirements.lock names one version of each package
that fits it, with hashes."""

import os
import re
from importlib import metadata

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Package -> a version with a known hole that anybody might have, and the first without it.
HOLES = {
    "torch": ("2.9.1", "2.13.0"),
    "transformers": ("5.2.0", "5.23.0"),
    "pillow": ("12.2.0", "12.3.0"),
    "pyarrow": ("23.0.0", "23.0.1"),
    "sentencepiece": ("0.2.0", "0.2.1"),
    "gradio": ("6.6.0", "6.31.0"),
    "tqdm": ("4.66.2", "4.66.3"),
}


def read_requirements() -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(one.name): one for one in found}


def read_lock() -> dict[str, list[tuple[Requirement, list[str]]]]:
    """Package -> its versions, which may differ by system, each with its hashes."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    found: dict[str, list] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            requirement, *hashes = re.split(r"\s+--hash=", line.strip())
            one = Requirement(requirement)
            found.setdefault(canonicalize_name(one.name), []).append((one, hashes))
    return found


@pytest.mark.parametrize("name", HOLES)
def test_versions_with_known_holes_are_excluded(name):
    specifier = read_requirements()[name].specifier
    with_hole, without = HOLES[name]
    assert with_hole not in specifier and without in specifier


def test_the_lock_fits_what_is_required():
    """All but torch, of which machines take different builds."""
    lock = read_lock()
    assert len(lock) > 50 and "torch" not in lock
    for name, requirement in read_requirements().items():
        for one, _ in lock[name] if name != "torch" else []:
            (pin,) = one.specifier
            assert pin.operator == "==" and pin.version in requirement.specifier, name


def test_every_package_of_the_lock_has_hashes_and_no_address():
    for name, versions in read_lock().items():
        for one, hashes in versions:
            assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", digest) for digest in hashes), name
            assert one.url is None and len(one.specifier) == 1
    assert "://" not in (ROOT / "requirements.lock").read_text()


def test_the_command_that_makes_the_lock_is_named_where_a_person_looks():
    header = (ROOT / "requirements.lock").read_text().splitlines()[1]
    command = header.removeprefix("#").strip()
    assert command.startswith("uv pip compile - ") and command in (ROOT / "requirements.txt").read_text()
    assert "requirements.lock" in (ROOT / "README.md").read_text()


@pytest.mark.skipif("LOCKED" not in os.environ, reason="the environment was not made from the lock")
def test_what_is_installed_is_what_is_locked():
    for name, versions in read_lock().items():
        wanted = [one for one, _ in versions if one.marker is None or one.marker.evaluate()]
        for one in wanted:
            assert metadata.version(name) in one.specifier, name
