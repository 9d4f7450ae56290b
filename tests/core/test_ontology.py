"""AudioSet's classes and who is whose ancestor."""

import subprocess
import sys

import pytest

from pipeline.core import ontology

NODES = sorted(ontology._children())


def mid(name: str) -> str:
    return next(c.mid for c in ontology.classes() if c.name == name)


def test_there_are_527_classes_and_every_one_is_a_node():
    classes = ontology.classes()
    assert [c.index for c in classes] == list(range(527))
    assert classes[0] == ontology.Class(0, "/m/09x0r", "Speech")
    assert classes[1].name == "Male speech, man speaking"  # a name with a comma in it
    assert all(ontology.is_node(c.mid) for c in classes)
    assert len(NODES) == 632


def test_ancestors_and_descendants_agree_with_the_closure_of_the_graph():
    edges = {(parent, child) for parent, children in ontology._children().items() for child in children}
    below = {node: {node} for node in NODES}
    changed = True
    while changed:
        changed = False
        for parent, child in edges:
            if not below[child] <= below[parent]:
                below[parent] |= below[child]
                changed = True
    for node in NODES:
        assert ontology.descendants(node) == below[node] - {node}
        assert ontology.ancestors(node) == {other for other in NODES if node in below[other]} - {node}


def test_kin_is_mutual_holds_oneself_and_no_siblings():
    for node in NODES:
        assert node in ontology.kin(node)
        assert all(node in ontology.kin(other) for other in ontology.kin(node))
    assert mid("Animal") in ontology.kin(mid("Bark"))
    assert mid("Bark") in ontology.kin(mid("Dog"))
    assert mid("Pink noise") not in ontology.kin(mid("White noise"))
    assert mid("Chirp tone") in ontology.kin(mid("Sine wave"))


def test_what_is_no_class_is_refused_by_name():
    with pytest.raises(ValueError, match="no class '/m/nonsense' among AudioSet's 527"):
        ontology.class_of("/m/nonsense")
    with pytest.raises(ValueError, match="no node 'Speech' in"):
        ontology.kin("Speech")
    assert ontology.is_node("/m/0dgw9r")  # Human sounds: a node, but no class
    assert not ontology.is_class("/m/0dgw9r")


def test_neither_the_data_sets_nor_scan_load_torch_or_read_a_file_at_import():
    code = (
        "import sys; from pipeline.stages import scan; from pipeline.core import ontology\n"
        "from pipeline.datasets import audioset, esc50, fsd50k, synthetic\n"
        "assert ontology.classes.cache_info().currsize == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
