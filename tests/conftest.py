"""Eight fake CPU devices, and JAX at its strictest: no silent promotion of ranks or dtypes."""

import gc
import os
import tempfile
import time
from collections import OrderedDict

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Tiny programs: compiling is all they cost, and XLA's older emitters take half the time over it. Both workers have a core each,
# and a program in many pieces for many threads to compile takes a fifth longer than in one.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import pytest
from jax._src import compilation_cache

# The same tiny programs are compiled again and again: keep them for the session, and for the next one.
jax.config.update(
    "jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), f"finetune_jax_tests_{os.getuid()}")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


class LoadedPrograms:
    """The last programs of the cache, ready to run: to load them again is a quarter to a half of a short run, and a test has three.

    Stands before the two functions by which JAX reads and writes a program. Names have all that JAX tells programs apart by.
    """

    LAST = 100

    def __init__(self) -> None:
        self._load = compilation_cache.get_executable_and_time
        self._store = compilation_cache.put_executable_and_time
        self._programs = OrderedDict()  # name -> (program, seconds over which it was compiled)
        compilation_cache.get_executable_and_time = self.load
        compilation_cache.put_executable_and_time = self.store

    def load(self, key, options, backend, devices):
        name = self._name(key, devices)
        found = self._programs.pop(name, None) or self._load(key, options, backend, devices)
        if found[0] is not None:
            self._keep(name, found)
        return found

    def store(self, key, module, program, backend, seconds):
        self._store(key, module, program, backend, seconds)
        self._keep(self._name(key, program.local_devices()), (program, seconds))

    def _name(self, key, devices):
        return jax.config.jax_compilation_cache_dir, key, tuple(device.id for device in devices)

    def _keep(self, name, found):
        self._programs[name] = found
        if len(self._programs) > self.LAST:
            self._programs.popitem(last=False)


LoadedPrograms()
jax.config.update("jax_traceback_in_locations_limit", 0)  # nobody profiles them
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items) -> None:
    """Long tests stand last: where time runs out, all others have run."""
    items.sort(key=lambda item: item.get_closest_marker("long") is not None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item) -> None:
    until = float(os.environ.get("LONG_TESTS_UNTIL", "inf"))
    if time.time() > until and item.get_closest_marker("long"):
        pytest.skip("a long test, and $LONG_TESTS_UNTIL is past")


def pytest_collection_finish() -> None:
    """What was imported (torch, transformers, JAX) stays: looking through it for garbage would be a fourteenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _cache_outside_home(tmp_path_factory):
    """Prepared data of the tests lives in pytest's own folder, shared by the tests of one session."""
    cache = tmp_path_factory.getbasetemp() / "finetune_jax_cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_JAX_CACHE", str(cache))
        yield


@pytest.fixture(scope="module")
def leftovers_of_orbax():
    """What saves that failed leave of Orbax's coroutines warns here, where that is expected, and not in the module after this one."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory):
    """(a tiny BertForMaskedLM of transformers, its folder)."""
    import torch
    import transformers

    from tests import tiny

    torch.manual_seed(0)
    config = transformers.BertConfig(**{**tiny.FIELDS, "initializer_range": 0.5})
    model = transformers.BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.cls.predictions.bias.add_(torch.randn_like(model.cls.predictions.bias))
    folder = tmp_path_factory.mktemp("masked_lm")
    model.save_pretrained(folder)
    tiny.write_vocab(folder)
    return model, folder
