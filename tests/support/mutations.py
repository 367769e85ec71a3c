"""Kernels with one change in their text: some check must fail for each.

A barrier less, a bound one off, a rotation or scale missing: were no check to fail, no check would
be about it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from rotormlx.mlx.backends import first_call
from tests import emulator


@dataclass(frozen=True, eq=False)
class Mutation:
    """A change and the check that must fail.

    Attributes:
        old, new: What stands in the text, and what stands there instead.
        check: Called with the platform; raises AssertionError, or what the emulator raises, when
            it fails.
        where: More for the platform's ``mutated``, such as the kernel's name.
        trims: Changes that leave out kernels which the check does not launch.
    """

    old: str
    new: str
    check: Callable[[Any], None]
    where: tuple[tuple[str, object], ...] = ()
    trims: tuple[tuple[str, str], ...] = ()

    def in_place(self, runner):
        """The platform's kernels with the change."""
        return runner.mutated((*self.trims, (self.old, self.new)), **dict(self.where))

    def is_caught(self, runner):
        """Whether the check fails."""
        with self.in_place(runner):
            try:
                self.check(runner)
            except (AssertionError, emulator.KernelError):
                return True
            except first_call.KernelError as error:
                if isinstance(error.__cause__, emulator.KernelError):
                    return True
                raise  # the changed text does not compile
        return False


def of(check, *arguments, **more):
    """A check of the platform with these arguments."""
    return lambda runner: check(runner, *arguments, **more)


def attends(pose, case):
    """A check that attention is right for a case's problem."""

    def check(runner):
        posed = pose(case)
        assert posed.is_right(posed.run(runner))

    return check


def each(mutations):
    """A test of each mutation, whose id begins with what is changed."""
    mutations = list(mutations)
    names = [re.sub(r"\W+", "-", f"{m.old}-to-{m.new}").strip("-")[:60] for m in mutations]
    return pytest.mark.parametrize("mutation", mutations, ids=names)
