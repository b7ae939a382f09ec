"""The campaign of kills: what it covers, what is a fault, what its table counts. It takes an hour itself."""

import campaign
import pytest

from vit.parallel.plugins import PLUGINS


def test_every_plugin_and_every_mode_of_tensor_parallelism_is_killed():
    flags = " ".join(words for _, words in campaign.DEMO.values())
    assert all(f"--plugin {plugin}" in flags for plugin in PLUGINS if plugin != "none")
    assert {"1d", "2d", "2.5d", "3d"} <= set(campaign.CASES)


def kill(**changes) -> dict:
    return dict(instant="start", victim="agent", seconds=1.5, lost=False, orphans=False) | changes


@pytest.mark.parametrize("changes, fault", [({}, False), ({"lost": True}, True), ({"orphans": True}, True)])
def test_lost_checkpoint_or_an_orphan_is_a_fault(changes, fault):
    assert campaign.is_fault(kill(**changes)) == fault


def test_table_counts_by_case_victim_and_instant():
    late = kill(victim="bash", instant="export", seconds=12.0, orphans=True)
    rows = [
        dict(case="ddp", equal=True, kills=[kill(), late]),
        dict(case="3d", equal=False, kills=[kill(victim="bash", lost=True)]),
    ]
    lines = campaign.table(rows).splitlines()
    assert "| ddp | 1 | 2 | 0 | 0 | 1 | 12.0 |" in lines
    assert "| 3d | 1 | 1 | 1 | 1 | 0 | 1.5 |" in lines
    assert "| victim: bash | 2 | 2 | 1 | 1 | 1 | 12.0 |" in lines
    assert "| instant: start | 2 | 2 | 1 | 1 | 0 | 1.5 |" in lines
    assert lines[-1] == "| all | 2 | 3 | 1 | 1 | 1 | 12.0 |"


def test_victims_are_found_by_the_folder_of_the_run(tmp_path):
    assert campaign.victims_of("bash", 123, tmp_path, None) == [123]
    assert campaign.victims_of("all ranks", 123, tmp_path, None) == []
