import pytest
from comfyui.host import HOW, Host, find_hosts, started
from comfyui.random_weights import write_controlnet, write_lora

HOSTS = find_hosts()


def pytest_generate_tests(metafunc):
    """Run all tests on the newest host, and those marked `every_host` on the others too."""
    if "host" in metafunc.fixturenames:
        marked = metafunc.definition.get_closest_marker("every_host")
        hosts = (HOSTS if marked else HOSTS[:1]) or [None]
        names = [found.version if found else "none" for found in hosts]
        metafunc.parametrize("host", hosts, indirect=True, ids=names, scope="session")


@pytest.fixture(scope="session")
def host(request, tmp_path_factory) -> Host:
    if request.param is None:
        pytest.skip(HOW)
    with started(request.param, tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="session")
def lora(host) -> str:
    return write_lora(host)


@pytest.fixture(scope="session")
def controlnet(host) -> str:
    return write_controlnet(host)
