"""Imported before torch: OpenMP's threads wait as those of the `afa` command do, unless the user says otherwise."""

from afa_model.runtime.machine import share_the_machine

share_the_machine()
