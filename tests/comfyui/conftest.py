import pytest
from comfyui.host import HOW, Host, find_host, find_python, started


def pytest_collection_modifyitems(items):
    for item in items:
        if "comfyui" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group("comfyui"))  # one server serves them all


@pytest.fixture(scope="session")
def host(tmp_path_factory) -> Host:
    place = find_host()
    python = place and find_python(place)
    if python is None:
        pytest.skip(HOW)
    with started(place, python, tmp_path_factory.mktemp("comfyui")) as running:
        yield running
