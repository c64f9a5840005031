import pytest
from comfyui.host import HOW, Host, find_host, find_python, started


@pytest.fixture(scope="session")
def host(tmp_path_factory) -> Host:
    place = find_host()
    python = place and find_python(place)
    if python is None:
        pytest.skip(HOW)
    with started(place, python, tmp_path_factory.mktemp("comfyui")) as running:
        yield running
