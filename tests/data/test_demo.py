"""The phantom on demand."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from hae_jax.configs import phantom
from hae_jax.data.store import open_store
from hae_jax.errors import UserError
from hae_jax.phantom import on_demand as demo


@pytest.fixture
def data(tmp_path):
    data = phantom.get_config().data
    data.root = str(tmp_path / "store")
    data.phantom.update({"cases": str(tmp_path / "cases"), "subjects": 3, "size": 0.1, "workers": 1,
                         "train_fraction": 0.34, "val_fraction": 0.34})
    return data


def test_makes_what_is_absent_and_nothing_twice(data, monkeypatch, capsys):
    demo.ensure_phantom(data, 16)
    store = open_store(data.root)
    assert store.manifest["slice_shape"] == [16, 16, 4]
    assert [store.manifest["splits"][split]["cases"] for split in ("train", "val", "test")] == [1, 1, 1]
    assert "making a phantom of 3 subjects" in capsys.readouterr().out
    monkeypatch.setattr(demo, "make_phantom", lambda *_, **__: pytest.fail("made again"))
    demo.ensure_phantom(data, 16)
    for field, value, says in (("seed", 7, "seed 1000 instead of 7"), ("subjects", 4, "3 subjects instead of 4")):
        other = data.copy_and_resolve_references()
        other.phantom[field] = value
        with pytest.raises(UserError, match=says):
            demo.ensure_phantom(other, 16)


def test_a_second_command_waits_for_the_first(data, monkeypatch):
    made, make, second = [], demo.make_phantom, []

    def making(*args, **kwargs):
        made.append(args)
        if not second:
            second.append(pool.submit(demo.ensure_phantom, data, 16))
        return make(*args, **kwargs)

    monkeypatch.setattr(demo, "make_phantom", making)
    with ThreadPoolExecutor(1) as pool:
        demo.ensure_phantom(data, 16)
    second[0].result()
    assert len(made) == 1
    assert open_store(data.root).manifest["splits"]["test"]["cases"] == 1


def test_real_data_are_not_replaced(data, monkeypatch):
    monkeypatch.setattr(demo, "make_phantom", lambda *_, **__: pytest.fail("made"))
    data.phantom = None
    demo.ensure_phantom(data, 16)
