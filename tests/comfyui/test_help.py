"""Help pages of nodes, texts in locales, the icon, and the list of the template browser."""

import json
import urllib.request

from comfyui.host import REPO

PACK = "fatezero-video"


def nodes(host):
    return {name: about for name, about in host.get("/object_info").items() if name.startswith("FateZero")}


def sockets(about):
    return {**about["input"].get("required", {}), **about["input"].get("optional", {})}


def test_every_node_has_a_help_page_that_names_every_socket(host):
    for name, about in nodes(host).items():
        with urllib.request.urlopen(f"{host.url}/extensions/{PACK}/docs/{name}.md") as answer:
            text = answer.read().decode()
        assert text.startswith(f"# {about['display_name']}\n\n{about['description']}\n")
        for socket, options in sockets(about).items():
            assert f"| `{socket}` | {options[1]['tooltip']} |" in text
        for socket, tooltip in zip(about["output_name"], about["output_tooltips"], strict=True):
            assert f"| `{socket}` | {tooltip} |" in text


def test_the_english_texts_match_the_nodes(host):
    texts = host.get("/i18n")["en"]["nodeDefs"]
    for name, about in nodes(host).items():
        entry = texts[name]
        assert (entry["display_name"], entry["description"]) == (about["display_name"], about["description"])
        assert entry["inputs"] == {k: {"name": k, "tooltip": o[1]["tooltip"]} for k, o in sockets(about).items()}
        outputs = zip(about["output_name"], about["output_tooltips"], strict=True)
        assert list(entry["outputs"].values()) == [{"name": n, "tooltip": t} for n, t in outputs]


def test_the_template_browser_lists_the_workflows(host):
    listed = host.get("/workflow_templates")
    assert set(listed[PACK]) == {path.stem for path in (REPO / "workflows").glob("*.json")}


def test_every_node_has_search_aliases_if_the_host_supports_them(host):
    """Older hosts have no such field."""
    aliases = [about.get("search_aliases") for about in nodes(host).values()]
    assert all(aliases) or not any(aliases)
    assert json.dumps(aliases)
