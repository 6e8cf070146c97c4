"""The documentation is built as a site, without network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


def text_of(site, name):
    return (site / name / "index.html").read_text(encoding="utf-8")


def test_every_page_of_the_repository_is_on_the_site(site):
    for path in (ROOT / "docs").glob("*.md"):
        assert (site / path.stem / "index.html").is_file(), path.stem
    for name in ("contributing", "changelog", "benchmarks", "studies"):
        assert (site / name / "index.html").is_file()
    for path in (ROOT / "examples").glob("*.*"):
        assert (site / "examples" / path.stem / "index.html").is_file(), path.name
    assert "When it pays" in text_of(site, "")


def test_links_between_pages_lead_to_pages(site):
    """mkdocs checks the anchors, but not links to other files than pages."""
    found = 0
    for page in site.rglob("*.html"):
        for link in re.findall(r'href="([^"#?]+)', page.read_text(encoding="utf-8")):
            if not re.match(r"https?:|mailto:|/", link) and page.name != "404.html":
                found += 1
                assert (page.parent / link).exists(), (page, link)
    assert found > 1000


def test_formulas_and_the_notebook_are_rendered(site):
    method = text_of(site, "method")
    assert method.count("<math") > 30
    assert "\\sum" not in re.sub(r"<(annotation|code).*?</\1>", "", method, flags=re.DOTALL)
    notebook = text_of(site, "examples/learner_to_mixmo")
    assert notebook.count("data:image/png") >= 3
    assert "fit_one_cycle" in notebook


def test_reference_has_names_formulas_and_examples(site):
    page = text_of(site, "api/callbacks")
    assert 'id="mixmo_fastai.callbacks.mixmo.MixMoCallback"' in page
    metrics = text_of(site, "api/metrics")
    assert "Examples:" in metrics
    assert "admonition" not in metrics


def test_search_finds_settings_and_functions(site):
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    texts = " ".join(entry["title"] + entry["text"] for entry in index["docs"])
    for word in ("early_repetition", "ConformalSets", "SIGUSR1"):
        assert word in texts


def test_site_needs_no_other_server(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)', text)
        loaded += re.findall(r'<link[^>]+rel="stylesheet"[^>]+href="(https?:[^"]+)', text)
        assert not loaded, page
