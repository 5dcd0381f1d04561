"""Settings that must hold before jax is imported: 8 virtual CPU devices, types checked, warnings are errors."""

import gc
import os
import pathlib
import warnings

import copies
import environment
import fake_gcs

os.environ.update(environment.variables(devices=8))

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

os.environ["NPROC"] = "128"  # as `distributed.reserve_threads`, which must not be imported before the hook
jax.devices()
del os.environ["NPROC"]  # not for the processes that tests start

install_import_hook("cola_jax", "beartype.beartype")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def _storage():
    store = fake_gcs.Store()
    with fake_gcs.serving(store) as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():  # read once a process
            patch.setenv(name, value)
        yield store


@pytest.fixture
def bucket(_storage):
    """Google Cloud Storage with the empty bucket gs://bucket (`fake_gcs.Store`)."""
    yield _storage
    _storage.objects.clear()
    _storage.refuse = lambda method, name: None


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Directory of compiled programs, shared by the programs that the tests of a session start."""
    yield tmp_path_factory.mktemp("cache")
    copies.close()


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Third parties' own deprecations are theirs; what we call stays an error.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("error", category=DeprecationWarning, module=r"cola_jax\b")
        warnings.filterwarnings("ignore", message="Sending a large body", category=ResourceWarning)  # gcsfs to aiohttp
        yield


@pytest.fixture(autouse=True, scope="module")
def _what_a_module_leaves_behind():
    """Two costs of a long session, which must not grow with it.

    A collection of Python's garbage goes through all objects, of which traced programs leave millions: it took seconds
    each time, a third of the session. Those that outlive their module are not looked at again.

    Every compiled program takes some thirty memory maps, of which a Linux process may have 65,530: then it dies.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        gc.unfreeze()
        jax.clear_caches()
    gc.collect()
    gc.freeze()
