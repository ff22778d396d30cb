"""The documentation site: `sphinx-build -W docs docs/_build/html`, without a network."""

import importlib.metadata
import re
import shutil
import sys
from pathlib import Path

import matplotlib

import sam_optax
import sam_optax.plots

matplotlib.use("agg")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import pictures  # noqa: E402

project = "sam_optax"
author = "The sam_optax authors"
copyright = author
version = release = sam_optax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
# autosummary writes its pages with the first suffix: with Markdown first they would show as text.
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["_build", "gallery_src", "**/sg_execution_times.rst", "sg_execution_times.rst"]
exclude_patterns += ["gallery/*.ipynb", "gallery/*.py"]
default_role = "any"  # `sam` links, and a name that is nowhere is a warning
templates_path = ["_templates"]

autosummary_generate = True
# The methods' pages have a picture each; the folder is git's to ignore.
autosummary_context = {
    "pictures": pictures.draw_all(ROOT / "docs" / "api" / "generated" / "pictures")
}
# A page's name is not that of its function, between which `name` could not choose.
autosummary_filename_map = {
    f"{module.__name__}.{name}": f"{module.__name__}-{name}"
    for module in (
        sam_optax,
        sam_optax.diagnostics,
        sam_optax.perturbations,
        sam_optax.plots,
        sam_optax.policies,
        sam_optax.surrogates,
        sam_optax.training,
    )
    for name in vars(module)
}
autodoc_typehints = "signature"
autodoc_type_aliases = {
    name: name for name in ("Gradient", "Params", "ScalarOrSchedule", "State", "Mask")
}
python_use_unqualified_type_names = True
maximum_signature_line_length = 60
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
# The notebooks are pages, run once and kept; the folder is git's to ignore. (The Markdown pages
# have no cells to run here: their code is run by the tests.)
shutil.copytree(ROOT / "notebooks", ROOT / "docs" / "notebooks", dirs_exist_ok=True)
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "docs" / "_build" / "notebooks")
nb_execution_timeout = 300
nb_execution_raise_on_error = True

sphinx_gallery_conf = {
    "examples_dirs": "gallery_src",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "remove_config_comments": True,
    "matplotlib_animations": True,
}

html_theme = "pydata_sphinx_theme"
html_title = "sam_optax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_prev_next": False,
    # Wide tables get the room of the page's own contents.
    "secondary_sidebar_items": {
        "**": ["page-toc"],
        "methods/library": [],
        "methods/index": [],
        "papers/results": [],
        "benchmarks": [],
    },
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
mathjax_path = "mathjax/tex-chtml.js"

# Files of the repository that are pages here, and where the links between them lead.
INCLUDED = {
    "benchmarks/README.md": "benchmarks",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "examples/papers/RESULTS.md": "papers/results",
}
LINK = re.compile(r"\[([^][]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def read(app, docname, source):
    """Take in the root's files, and turn links between files into links between pages."""
    here = Path(app.env.doc2path(docname)).parent
    for path, page in INCLUDED.items():
        if page == docname:
            here = (ROOT / path).parent
            source[0] = (ROOT / path).read_text(encoding="utf-8")

    def link(match):
        text, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target or target.startswith(("/", "mailto:")):
            return match[0]
        file = (here / target).resolve()
        if not file.is_relative_to(ROOT):
            return match[0]
        path = file.relative_to(ROOT).as_posix()
        if path in INCLUDED:
            return f"[{text}](/{INCLUDED[path]}.md{anchor})"
        if path == "README.md":
            return f"[{text}](/index.md)"
        if path.startswith("docs/"):
            return f"[{text}](/{path.removeprefix('docs/')}{anchor})"
        if file.exists():  # a program or a folder of the repository
            return text if text.startswith("`") else f"{text} (`{path}`)"
        return match[0]

    if app.env.doc2path(docname).suffix == ".md":
        source[0] = LINK.sub(link, source[0])


def apart(app, what, name, obj, options, lines):
    """Cost, When and Reduces to: a paragraph each, with its name in bold."""
    labels = re.compile(r"(Cost|When|Reduces to): ")
    for i in reversed(range(len(lines))):
        if labels.match(lines[i]):
            lines[i : i + 1] = ["", labels.sub(r"**\1:** ", lines[i], count=1)]


def short(app, what, name, obj, options, signature, returns):
    """An alias in a union by its name alone."""
    pattern = re.compile(r"TypeAliasForwardRef\('(\w+)'\)")
    return pattern.sub(r"\1", signature or "") or None, pattern.sub(r"\1", returns or "") or None


def copy_mathjax(app, error):
    """Formulas without a network: MathJax's one file and its fonts."""
    if error is None and app.builder.format == "html":
        files = importlib.metadata.files("sphinx-mathjax-offline") or []
        (script,) = (file.locate() for file in files if file.name == "tex-chtml.js")
        target = Path(app.outdir) / "_static" / "mathjax"
        shutil.copytree(
            Path(script).parent / "output" / "chtml" / "fonts",
            target / "output" / "chtml" / "fonts",
            dirs_exist_ok=True,
        )
        shutil.copy(script, target)


def setup(app):
    """Sphinx calls it."""
    app.connect("autodoc-process-docstring", apart, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", short)
    app.connect("source-read", read)
    app.connect("build-finished", copy_mathjax)
