from pathlib import Path

import pytest

from tests.helpers.shards import jpeg
from trainer.data.writing.manifest import KNOWN_COLUMNS, near_misses, read_table
from trainer.errors import ConfigError

ROWS = [{"path": "a.jpg", "label": "1", "person": "Zoë"}, {"path": "b.jpg", "label": "0", "person": ""}]


def written(folder: Path, content: bytes | str, name: str = "m.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        "path,label,person\na.jpg,1,Zoë\nb.jpg,0,\n",
        "path,label,person\r\na.jpg,1,Zoë\r\nb.jpg,0,\r\n",
        "\ufeffpath,label,person\na.jpg,1,Zoë\nb.jpg,0,",
        "path,label,person\na.jpg,1,Zoë\nb.jpg,0,\n".encode("utf-16"),
        "path;label;person\na.jpg;1;Zoë\nb.jpg;0;\n",
        "sep=;\npath;label;person\na.jpg;1;Zoë\nb.jpg;0;\n",
        "path\tlabel\tperson\na.jpg\t1\tZoë\nb.jpg\t0\t\n",
        " path , label, person\na.jpg, 1 , Zoë\nb.jpg,0,\n\n \n,,\n",
        '"path","label","person"\n"a.jpg", "1", "Zoë"\n"b.jpg","0",""\n',
        "path,label,person,,\na.jpg,1,Zoë,,\nb.jpg,0,,,\n",
        "path,label,person\na.jpg,1,Zoë,\nb.jpg,0,,\n",
    ],
    ids=["plain", "crlf", "bom", "utf-16", "semicolons", "sep", "tabs", "spaces", "quotes", "empty-columns", "commas"],
)
def test_every_usual_way_to_write_a_table_gives_the_same_rows(tmp_path: Path, content: bytes | str) -> None:
    table = read_table(written(tmp_path, content), setting="source")
    assert table.rows == ROWS
    assert table.columns == ["path", "label", "person"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,Label\na.jpg,1\n", "column 'Label', which no command reads: write 'label'"),
        ("path,lables\na.jpg,1\n", "column 'lables', which no command reads: write 'label'"),
        ("path,identity2\na.jpg,1\n", "column 'identity2', which no command reads: write 'identity_2'"),
        ("path,identity,identity_b\na.jpg,1,2\n", "column 'identity_b', which no command reads: write 'identity_2'"),
        ("Path;Label\na.jpg;1\n", "column 'Path', which no command reads: write 'path'"),
        ("file,label\na.jpg,1\n", "columns 'file', 'label', but needs 'path'"),
        ("path,label,label\na.jpg,1,0\n", "2 columns 'label'"),
        ("path,,x\na.jpg,1,0\n", "column 2 has no name"),
        ("path,label\na.jpg\n", "line 2: it does not have one value for each column"),
        ("path,label\na,b.jpg,1\n", "line 2: it does not have one value for each column"),
        ('path,label\n"a.jpg,1\nb.jpg,1\n', "close each quotation mark"),
        ("path,label\n,1\n", "line 2: path is empty"),
        ("path,label\n\n", "has no rows"),
        ("\n\n", "is empty: write a header"),
        ("path,person\na.jpg,Zo\xeb\n".encode("latin-1"), "line 2: it is not UTF-8.*iconv -f WINDOWS-1252"),
        ("path\na.jpg\n".encode("utf-16-le"), "holds zero bytes"),
        (b"PAR1\0\0", "is a Parquet file"),
        (b"PK\x03\x04", "is a zip file or a spreadsheet"),
        (b"\x1f\x8b\x08", "is compressed with gzip"),
        (jpeg(1), "is an image: name the folder"),
        (bytes(257) + b"ustar\x0000", "is a tar"),
    ],
)
def test_what_would_lose_rows_or_columns_is_refused_with_a_remedy(
    tmp_path: Path, content: bytes | str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_table(written(tmp_path, content), setting="source")


def test_columns_that_mean_something_else_may_stay() -> None:
    for column in ("person", "age", "attack_type", "date", "level", "sex", "file", "class", *KNOWN_COLUMNS):
        assert not near_misses(column), column
    for column in ("PATH", "paths", "Key", "key ", "identty", "indentity", "atack", "sorce", "landmarkname"):
        assert near_misses(column), column
