"""Files into documents: what is found, how it is read, how what is too large is divided."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from magnatronic.demo import installed_documents
from magnatronic.errors import WrongInputError
from magnatronic.ingest import MAX_TEXT_BYTES, Skipped, find_files, load_file, split_document
from schemas.events import DocumentSubmitted


def loaded(path: Path, content: str | bytes) -> DocumentSubmitted:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    document = load_file(path)
    assert isinstance(document, DocumentSubmitted), document
    return document


def skipped(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    document = load_file(path)
    assert isinstance(document, Skipped)
    return document.reason


def write_pdf(path: Path, text: str, *, title: str = "", password: str = "") -> None:
    """A PDF of one page with ``text`` in it."""
    writer = PdfWriter()
    page = writer.add_blank_page(300, 300)
    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    fonts = DictionaryObject({NameObject("/F1"): font})
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    content = DecodedStreamObject()
    content.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
    page[NameObject("/Contents")] = writer._add_object(content)
    if title:
        writer.add_metadata({"/Title": title})
    if password:
        writer.encrypt(password)
    writer.write(path)


def test_folders_are_searched_and_what_is_hidden_or_foreign_is_passed_over(tmp_path: Path) -> None:
    for name in ("b.md", "a.TXT", "sub/c.rst", "sub/deep/d.html", ".git/x.md", ".hidden.md", "e.py", "f.pdf"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "loop").symlink_to(tmp_path)
    files, left_out = find_files([tmp_path, tmp_path / "b.md"])
    names = [str(path.relative_to(tmp_path)) for path in files]
    assert names == ["a.TXT", "b.md", "f.pdf", "sub/c.rst", "sub/deep/d.html"]
    assert left_out == []


def test_a_file_named_by_hand_that_cannot_be_read_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "e.py").write_text("pass")
    files, left_out = find_files([tmp_path / "e.py"])
    assert files == []
    assert ".py can't be read, only" in left_out[0].reason


def test_a_path_that_does_not_exist_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(WrongInputError, match="there is no"):
        find_files([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("name", "text", "title", "media_type"),
    [
        ("a.md", "intro\n\n# Alpha `x` #\n\nbody", "Alpha `x`", "text/markdown"),
        ("a.md", "Alpha\n=====\n\nbody", "Alpha", "text/markdown"),
        ("a.rst", "=====\nAlpha\n=====\n\nbody", "Alpha", "text/x-rst"),
        ("a.html", "<head><TITLE>Al &amp;\n pha</TITLE></head><h1>No</h1>", "Al & pha", "text/html"),
        ("a.htm", "<h1>Al<b>pha</b></h1>", "Al pha", "text/html"),
        ("alpha.txt", "# not a title", "alpha", "text/plain"),
        ("alpha.md", "no heading here", "alpha", "text/markdown"),
    ],
)
def test_the_title_is_the_text_s_own_or_the_file_s_name(
    tmp_path: Path, name: str, text: str, title: str, media_type: str
) -> None:
    document = loaded(tmp_path / name, text)
    assert (document.title, document.media_type, document.text) == (title, media_type, text)


def test_the_id_is_the_path_so_that_the_same_file_replaces_itself(tmp_path: Path) -> None:
    first, second = loaded(tmp_path / "a.md", "# One"), loaded(tmp_path / "a.md", "# Two")
    assert first.document_id == second.document_id == (tmp_path / "a.md").as_uri()
    assert loaded(tmp_path / "b.md", "# One").document_id != first.document_id


def test_long_paths_keep_different_ids_of_bounded_length(tmp_path: Path) -> None:
    folder = tmp_path / ("ü" * 100) / ("ü" * 100)
    folder.mkdir(parents=True)
    first, second = loaded(folder / "a.md", "# One"), loaded(folder / "b.md", "# One")
    assert first.document_id != second.document_id
    assert len(first.document_id.encode()) <= 400


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Grüße".encode(), "Grüße"),
        (b"\xef\xbb\xbf" + "Grüße".encode(), "Grüße"),
        ("Grüße".encode("utf-16"), "Grüße"),
        ("Grüße".encode("cp1252"), "Grüße"),
        (b"\x81\x8d", "\x81\x8d"),
    ],
)
def test_text_is_read_in_the_encoding_it_has(tmp_path: Path, content: bytes, text: str) -> None:
    assert loaded(tmp_path / "a.txt", content).text == text


def test_html_may_name_its_encoding(tmp_path: Path) -> None:
    content = '<meta charset="koi8-r"><p>привет</p>'.encode("koi8-r")
    assert "привет" in loaded(tmp_path / "a.html", content).text


def test_what_holds_no_text_is_skipped_with_the_reason(tmp_path: Path) -> None:
    assert skipped(tmp_path / "a.txt", b"\x7fELF\0\0") == "it is binary, not text"
    assert skipped(tmp_path / "a.md", b" \n ") == "it holds no text"
    assert skipped(tmp_path / "a.pdf", b"%PDF-1.4 broken").startswith("it can't be read as PDF")
    write_pdf(tmp_path / "empty.pdf", "")
    assert "no text layer" in skipped(tmp_path / "empty.pdf", (tmp_path / "empty.pdf").read_bytes())
    missing = load_file(tmp_path / "gone.md")
    assert isinstance(missing, Skipped)
    assert missing.reason == "No such file or directory"


def test_a_pdf_gives_its_text_and_title(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", "The pump weighs nine kilos.", title="Pump manual")
    document = load_file(tmp_path / "a.pdf")
    assert isinstance(document, DocumentSubmitted)
    assert (document.title, document.media_type) == ("Pump manual", "text/plain")
    assert "The pump weighs nine kilos." in document.text


def test_an_encrypted_pdf_is_skipped(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", "secret", password="x")
    assert isinstance(load_file(tmp_path / "a.pdf"), Skipped)


def test_a_document_that_fits_stays_whole() -> None:
    document = DocumentSubmitted(document_id="d", title="t", text="x" * MAX_TEXT_BYTES)
    assert split_document(document) == [document]


def test_a_larger_one_is_divided_between_paragraphs() -> None:
    paragraphs = [f"Paragraph {number}. " + "word " * 20 for number in range(100)]
    document = DocumentSubmitted(document_id="d", title="t", text="\n\n".join(paragraphs), attributes={"a": "b"})
    parts = split_document(document, 2_000)
    assert len(parts) > 4
    assert "".join(part.text for part in parts) == document.text
    assert all(part.text.startswith("Paragraph") for part in parts)
    assert [part.document_id for part in parts[:3]] == ["d", "d#part-2", "d#part-3"]
    assert parts[1].attributes == {"a": "b", "part": "2", "parts": str(len(parts))}
    assert parts[1].title == f"t (part 2 of {len(parts)})"


@settings(deadline=None, max_examples=200)
@given(st.text(min_size=1), st.integers(8, 40))
def test_parts_are_within_the_bound_and_together_the_whole(text: str, bound: int) -> None:
    parts = split_document(DocumentSubmitted(document_id="d", title="t", text=text), bound)
    assert "".join(part.text for part in parts) == text
    assert all(0 < len(part.text.encode()) <= bound for part in parts)
    assert len({part.document_id for part in parts}) == len(parts)


def test_the_demo_s_corpus_is_the_readmes_of_what_is_installed() -> None:
    documents = {document.title.lower(): document for document in installed_documents()}
    assert len(documents) > 50
    click = documents["click"]
    assert (click.document_id, click.media_type) == ("distribution:click", "text/markdown")
    assert click.source.startswith("https://")
    assert "command line" in click.text
    assert {document.media_type for document in documents.values()} <= {"text/markdown", "text/x-rst", "text/plain"}
