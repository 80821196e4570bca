"""The data set of a store that commands use by default."""

from __future__ import annotations

from bragg_data.store.measured import SIMULATOR
from bragg_data.store.repository import Store, StoreError


def default_tag(store: Store) -> str:
    """Return the tag of the largest simulated data set of a store; of several the newest.

    Raises
    ------
    StoreError
        If the store holds none.
    """
    datasets = {tag: store.open(tag.name) for tag in store.tags()}
    simulated = {t: d for t, d in datasets.items() if d.attrs["simulator"] != SIMULATOR}
    if not simulated:
        raise StoreError(
            f"The store {store.uri} holds no finished data set yet. Make one with: "
            f"python -m pipelines.simulate"
        )
    return max(simulated, key=lambda tag: (simulated[tag].sizes["sample"], tag.written_at)).name
