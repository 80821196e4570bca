"""Tables of the curves of refined banks."""

import pandas as pd
import pytest

from bragg_data.handover.curves import write_csv
from tests.bragg_data.handover.refined import mixture


def test_a_table_has_the_curves_of_all_banks(tmp_path):
    file, banks = tmp_path / "curves.csv", mixture().banks
    write_csv(banks, file)
    table = pd.read_csv(file)
    names = ("tof", "d", "measured", "su", "calculated", "background", "difference")
    assert [name.split()[0] for name in table] == ["bank", *names]
    assert list(table.columns[1:3]) == ["tof (µs)", "d (Å)"]
    for bank in banks:
        rows = table[table["bank"] == bank.bank.number]
        assert rows["tof (µs)"].to_numpy() == pytest.approx(bank.bank.tof, rel=1e-7)
        assert rows["calculated (1/µs)"].to_numpy() == pytest.approx(bank.calculated, rel=1e-7)
        left = rows["measured (1/µs)"] - rows["calculated (1/µs)"]
        assert rows["difference (1/µs)"].to_numpy() == pytest.approx(left.to_numpy(), abs=1e-3)
        expected = bank.instrument.tof_from_d_spacing(rows["d (Å)"].to_numpy())
        assert expected == pytest.approx(bank.bank.tof, rel=1e-7)
