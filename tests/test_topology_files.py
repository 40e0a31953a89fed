"""Graphs and matrices as files, and their errors."""

import numpy as np
import pytest
import scipy.sparse as sp

from tests.test_topology import dense
from utils.errors import UsageError
from utils.topology import build_topology, metropolis_hastings


def from_text(tmp_path, text, num_workers, name="graph.txt"):
    path = tmp_path / name
    path.write_bytes(text.encode())
    return build_topology("file", num_workers, path=path)


def test_file_unweighted_edges_get_metropolis_hastings(tmp_path):
    topology = from_text(tmp_path, "# a path\n0 1\n1 2  # middle\n\n2 1\n2,3\n", 4)
    path = np.diag(np.ones(3), 1)
    assert np.array_equal(dense(topology)[0], metropolis_hastings(sp.csr_array(path + path.T)).toarray())
    assert topology.edges() == [(0, 1), (1, 2), (2, 3)]


def test_file_weighted_edges_are_row_receiver(tmp_path):
    topology = from_text(tmp_path, "0 0 0.5\n0 2 0.5\n1 0 1\n2 1 0.25\n2 2 0.75\n", 3)
    assert np.array_equal(dense(topology)[0], [[0.5, 0, 0.5], [1, 0, 0], [0, 0.25, 0.75]])
    assert topology.directed and not topology.is_doubly_stochastic
    assert topology.to_json()["doubly_stochastic"] is False


@pytest.mark.parametrize("name, separator", [("w.csv", ","), ("w.txt", " "), ("w.npy", None)])
def test_file_matrix(tmp_path, name, separator):
    weights = np.array([[0.5, 0.3, 0.2], [0.333333, 0.333333, 0.333333], [0.1, 0.0, 0.9]])
    path = tmp_path / name
    if separator is None:
        np.save(path, weights)
    else:
        path.write_text("\n".join(separator.join(map(str, row)) for row in weights.tolist()))
    (matrix,) = dense(build_topology("file", 3, path=path))
    assert np.allclose(matrix, weights, rtol=0, atol=1e-6)
    assert np.abs(matrix.sum(axis=1) - 1).max() < 1e-15  # six digits in, full precision out


def test_file_adjacency_matrix(tmp_path):
    star = dense(build_topology("star", 5))[0]
    path = tmp_path / "star.npy"
    np.save(path, star > 0)  # booleans, a diagonal of ones
    assert np.array_equal(dense(build_topology("file", 5, path=path))[0], star)


def test_gap_of_a_directed_file(tmp_path):
    """N = 100 goes through the sparse eigenvalue method; checked against the dense one."""
    rng = np.random.default_rng(0)
    weights = np.where(rng.random((100, 100)) < 0.1, rng.random((100, 100)), 0) + 0.2 * np.eye(100)
    weights /= weights.sum(axis=1, keepdims=True)
    path = tmp_path / "w.npy"
    np.save(path, weights)
    moduli = np.sort(np.abs(np.linalg.eigvals(weights)))
    assert build_topology("file", 100, path=path).spectral_gap == pytest.approx(1 - moduli[-2], abs=1e-8)


@pytest.mark.parametrize(
    "name, content, num_workers, message",
    [
        ("a.csv", "0.5,0.5\n0.5,0.5\n0.5,0.5", 2, "3 x 2; it must be square"),
        ("a.txt", "1 0 0 0\n0 1 0 0\n", 4, "2 x 4; it must be square"),
        ("a.csv", "0.5,0.5\n0.5", 2, "different lengths"),
        ("a.csv", "0.5,0.5\n0.5,0.5", 3, "for 2 workers, but --num_workers is 3"),
        ("a.csv", "1.5,-0.5\n0.5,0.5", 2, "must not be negative"),
        ("a.csv", "0.5,0.4\n0.5,0.5", 2, "row 0 sum to 0.9, not 1"),
        ("a.csv", "0.5,0.5\nnan,0.5", 2, "finite"),
        ("a.csv", "0,1,0\n0,0,1\n1,0,0", 3, "must be symmetric"),
        ("a.csv", "1,0\n0.5,0.5", 2, "not connected"),  # 0 never hears 1
        ("a.txt", "0 1\n2 3\n", 4, "not connected"),
        ("a.txt", "0 1\n1 2\n", 4, "not connected"),
        ("a.txt", "0 1\n1 4\n", 4, "line 2: no worker 4"),
        ("a.txt", "0 1\n1 -1\n", 4, "line 2: an edge is"),
        ("a.txt", "0 1\n1.5 2\n", 4, "line 2: an edge is"),
        ("a.txt", "0 1\n1\n", 4, "a weight, or none"),
        ("a.txt", "0\n", 4, "line 1: an edge is"),
        ("a.txt", "0 1 0.5\n0 1 0.5\n", 4, "line 2: the edge 0 1 is given twice"),
        ("a.txt", "0 1 0.5\n1 0\n", 4, "a weight, or none"),
        ("a.txt", "0 1\none two\n", 4, "line 2: 'one' is not a number"),
        ("a.txt", "# nothing\n", 4, "is empty"),
        ("a.txt", b"\xff\xfe\x00\x01", 4, "cannot read"),
        ("a.npy", b"not an array", 4, "cannot read"),
        ("a.npy", np.zeros(4), 4, "the matrix is 4; it must be square"),
        ("a.npy", np.zeros((2, 2), dtype=complex), 2, "real numbers"),
        ("a.npy", np.array([[None]]), 1, "real numbers, not object"),
        ("a.npy", np.zeros((2, 2)), 2, "not connected"),
        ("a.npy", np.zeros((0, 0)), 2, "for 0 workers"),
        ("missing.txt", None, 4, "cannot read.*No such file"),
        ("missing.npy", None, 4, "cannot read.*No such file"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, num_workers, message):
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(UsageError, match=message) as error:
        build_topology("file", num_workers, path=path)
    assert "\n" not in str(error.value) and name in str(error.value)


def npy_header(text):
    """What the .npy file of a matrix begins with, had it this header."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def npy(shape, dtype="<f8", order=False):
    return npy_header(f"{{'descr': {dtype!r}, 'fortran_order': {order}, 'shape': {shape}}}\n")


def test_file_entries_in_fortran_order_and_other_types(tmp_path):
    weights = np.array([[0.5, 0.25, 0.25], [0.0, 0.5, 0.5], [0.75, 0.0, 0.25]])
    for k, variant in enumerate((np.asfortranarray(weights), weights.astype(">f4"), weights.astype("g"))):
        np.save(tmp_path / f"{k}.npy", variant)
        assert np.array_equal(dense(build_topology("file", 3, path=tmp_path / f"{k}.npy"))[0], weights)


@pytest.mark.parametrize(
    "content, message",
    [
        (npy("(1000000, 1000000)"), "for 1000000 workers, but --num_workers is 2"),
        (npy("(2, 2)"), "cut off"),
        (npy("(2, 2)") + bytes(31), "cut off"),
        (npy("(-2, -2)"), "for -2 workers"),
        (npy("()") + bytes(8), "is one number; it must be square"),
        (npy("(2, 2, 2)") + bytes(64), "2 x 2 x 2"),
        (npy("(2.0, 2.0)"), "no header"),
        (npy("(" * 200 + "2" + ")" * 200), "no header"),
        (npy("(9" + "9" * 5000 + ", 2)"), "no header"),
        (npy("(2, 2)", "|O") + bytes(32), "real numbers, not object"),
        (npy("(2, 2)", [("a" * 999, "<f8")]) + bytes(32), "real numbers, not void64"),
        (npy("(2, 2)", "<f9999999999"), "no header"),
        (npy_header("-" * 9900 + "1\n"), "no header"),  # Python runs out of stack
        (npy("(2, 2)").replace(b"\x01\x00", b"\x09\x00", 1) + bytes(32), "no header"),
        (npy("(2, 2)")[:40], "no header"),
    ],
)
def test_npy_headers_are_judged_before_they_are_believed(tmp_path, content, message):
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        build_topology("file", 2, path=path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "text, message",
    [
        ("0 1_0\n", "line 1: '1_0' is not a number"),
        ("0 1\n1 ١\n", "line 2: '١' is not a number"),
        ("0 " + "1" * 9 + "x" * 10**6, "line 1: '1111.*xxx' is not a number"),
        ("0 " + "1" * 309, "no worker 1.1111.*e[+]308"),
        ("0 inf\n", "line 1: an edge is"),
        ("0.5,,0.5\n0.5,,0.5\n", "line 1: '' is not a number"),  # not the matrix of its other entries
        (",0,1\n0,.5,.5\n1,.5,.5\n", "line 1: '' is not a number"),  # the names of a data frame
        ("0,5;0,5\n0,5;0,5\n", "2 x 4"),
        ("1e308 1e308\n1e308 1e308\n", "sum to inf"),
        ("0 1\n".encode("utf-16-le").decode(), r"'0\\x00' is not a number"),
    ],
)
def test_numbers_that_are_not_what_they_seem(tmp_path, text, message, recwarn):
    with pytest.raises(UsageError, match=message) as error:
        from_text(tmp_path, text, 2)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 and not list(recwarn)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff0 1\n1 2\n",
        "0 1\r\n1 2\r\n",
        "0 1\r1 2",
        "0\t1\n1\u00a02\n",
        "0 , 1\n1 ;2\n",
        "0 1 # see\x85 2 and \u2028 0 2\n1 2\n",  # a comment ends with its line, and only \n and \r end lines
        "0e0 1.0\n1 2\n-0 1\n",
        "0 1 1\n1 2 1\n1 0 1\n1 1 1\n",
    ],
)
def test_spellings_of_the_same_path(tmp_path, text):
    assert from_text(tmp_path, text, 3).edges() == [(0, 1), (1, 2)]
