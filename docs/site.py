"""Hooks of mkdocs: pages that are not in docs/, links to them, and formulas.

The pages of docs/ are written to be read in the repository, where they link to files outside of it.
"""

import re
from functools import partial
from pathlib import Path
from urllib.parse import urldefrag

from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Section

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "studies/README.md": "studies.md",
}
"""Pages outside of docs/, relative to the repository, and their names on the site."""
NOTEBOOK = "examples/learner_to_mixmo.ipynb"
PACKAGES = (
    *("mixing", "models", "callbacks", "learner", "data", "metrics", "evaluation", "export"),
    *("training", "runs", "study", "config", "runtime", "loggers", "plots"),
)
"""Packages in the reference."""
DISPLAYED = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(^```.*?^```$|^~~~.*?^~~~$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)\s]+)(\))")
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.DOTALL)


@event_priority(100)  # before mkdocs-jupyter, which renders the notebook
def on_files(files, config):
    """Add the pages outside of docs/, the examples and the reference."""
    added = {target: (ROOT / source).read_text("utf-8") for source, target in PAGES.items()}
    for path in sorted((ROOT / "examples").glob("*.[pt][yo]*")):
        language = {".py": "python", ".toml": "toml"}[path.suffix]
        code = path.read_text("utf-8")
        added[f"examples/{path.stem}.md"] = f"# {path.name}\n\n```{language}\n{code}```\n"
    for package in PACKAGES:
        added[f"api/{package}.md"] = reference(package)
    for name, text in added.items():
        files.append(File.generated(config, name, content=text))
    files.append(File(NOTEBOOK, str(ROOT), config.site_dir, config.use_directory_urls))
    return Files([file for file in files if not file.src_uri.endswith(".py")])


def reference(package):
    """Return the page of a package: its public modules, one after another."""
    folder = ROOT / "mixmo_fastai" / package
    names = [path.stem for path in sorted(folder.glob("*.py")) if path.stem[0] != "_"]
    blocks = "\n\n".join(f"::: mixmo_fastai.{package}.{name}" for name in names)
    return f"# mixmo_fastai.{package}\n\n{blocks}\n"


def on_nav(nav, config, files):
    """Add the pages that are not listed in mkdocs.yml to the navigation."""
    sections = {"Examples": "examples/", "Reference": "api/", "Project": ""}
    listed = {page.file.src_uri for page in nav.pages}
    for title, start in sections.items():
        chosen = [
            file.page
            for file in files.documentation_pages()
            if file.src_uri not in listed
            and (file.src_uri.startswith(start) if start else "/" not in file.src_uri)
        ]
        nav.items.append(Section(title, chosen))
        for page in chosen:
            page.parent = nav.items[-1]
    return nav


def on_page_markdown(markdown, page, config, files):
    """Point links to the pages of the site, and turn formulas into MathML."""
    source = next((s for s, target in PAGES.items() if target == page.file.src_uri), None)
    folder = Path(source).parent if source else Path("docs") / Path(page.file.src_uri).parent
    if page.file.src_uri.startswith(("api/", "examples/")):
        return markdown
    depth = "../" * page.file.src_uri.count("/")
    displayed = DISPLAYED.sub(lambda found: f"$${found[1].strip()}$$", markdown)
    parts = CODE.split(displayed)
    for index in range(0, len(parts), 2):  # the others are code
        text = LINK.sub(partial(page_link, folder, depth), parts[index])
        parts[index] = FORMULA.sub(formula, text)
    return "".join(parts)


def on_page_content(html, page, config, files):
    """Point the links of the notebook to the pages of the site."""
    if page.file.src_uri != NOTEBOOK:
        return html
    return re.sub(r'href="\.\./docs/(\w+)\.md', r'href="../../\1/', html)


def page_link(folder, depth, found):
    """Return a link to the page of the site that a link of a page in the repository leads to."""
    path, anchor = urldefrag(found[2])
    name = (ROOT / folder / path).resolve().relative_to(ROOT).as_posix()
    if name.startswith("docs/"):
        name = name.removeprefix("docs/")
    elif name.startswith("examples/") and not name.endswith(".ipynb"):
        name = str(Path(name).with_suffix(".md"))
    name = PAGES.get(name, PAGES.get(f"{name}/README.md", name))
    return f"{found[1]}{depth}{name}#{anchor}{found[3]}" if anchor else f"{found[1]}{depth}{name})"


def formula(found):
    """Return MathML of a formula in LaTeX."""
    if found[1]:
        return f"<div>{convert(found[1], display='block')}</div>"
    return f"<span>{convert(found[2])}</span>"  # a line may not begin with <math>
