"""The declarative XML engine, on elements of its own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_worker.virt.libvirt.xmlmap import Attr, Child, Children, Element, Flag, Kib, Location, Step, Text
from compute_worker.virt.libvirt.xmlvalues import ON_OFF, YES_NO, Choice, Int


class Leaf(Element):
    TAG = "leaf"

    name = Attr("./@name")
    text = Text(".")


class Tree(Element):
    TAG = "tree"

    kind = Attr("./@kind", Choice("oak", "elm"))
    height = Attr("./@height", Int(1))
    title = Text("./title")
    title_lang = Attr("./title/@lang")
    serial = Text("./system/entry[@name='serial']")
    uuid = Text("./system/entry[@name='uuid']")
    deep = Attr("./a/b/@deep", ON_OFF)
    evergreen = Flag("./evergreen")
    memory = Kib("./memory")
    crown = Child("./crown", lambda: Crown)
    leaves = Children("./leaves/leaf", Leaf)


class Crown(Tree):
    TAG = "crown"

    shape = Attr("./@shape")


def test_location_is_read_from_a_path():
    assert Location.parse("./a/b[@k='v']/@c") == Location((Step("a"), Step("b", "k", "v")), "c")
    assert Location.parse("./{urn:x}a") == Location((Step("{urn:x}a"),), None)
    assert Location.parse(".") == Location((), None)


@pytest.mark.parametrize("path", ["./a//b", "./a[1]", "./a b", "./*"])
def test_location_refuses_what_it_does_not_know(path):
    with pytest.raises(ValueError, match="not a location"):
        Location.parse(path)


def test_empty_element_reads_as_absent():
    tree = Tree()
    absent = {name: getattr(tree, name) for name in Tree.PROPERTIES if name != "leaves"}
    assert set(absent.values()) == {None}
    assert list(tree.leaves) == []
    assert tree.to_xml() == "<tree />\n"


def test_output_is_in_the_order_of_declaration_whatever_the_order_of_assignment():
    forward = Tree(kind="oak", height=3, title="t", title_lang="en", serial="1", uuid="2", deep=True, evergreen=True)
    backward = Tree(evergreen=True, deep=True, uuid="2", serial="1", title_lang="en", title="t", height=3, kind="oak")
    assert forward.to_xml() == backward.to_xml()
    assert forward.to_xml().startswith('<tree kind="oak" height="3">\n  <title lang="en">t</title>\n  <system>')


def test_siblings_are_told_apart_by_their_attribute():
    tree = Tree(uuid="u", serial="s")
    assert [(e.get("name"), e.text) for e in tree.node.iter("entry")] == [("serial", "s"), ("uuid", "u")]
    tree.serial = None
    assert (tree.serial, tree.uuid) == (None, "u")
    tree.uuid = None
    assert tree.to_xml() == "<tree />\n"


def test_none_removes_the_location_and_parents_left_empty():
    tree = Tree(deep=True)
    assert tree.to_xml() == '<tree>\n  <a>\n    <b deep="on" />\n  </a>\n</tree>\n'
    tree.deep = None
    assert tree.to_xml() == "<tree />\n"


def test_none_keeps_parents_that_hold_something_else():
    tree = Tree.parse("<tree><a other='1'><b deep='on'/></a></tree>")
    tree.deep = None
    assert tree == Tree.parse("<tree><a other='1'/></tree>")


def test_flag_is_presence():
    tree = Tree(evergreen=True)
    assert tree.evergreen is True
    tree.evergreen = True
    assert len(list(tree.node)) == 1
    tree.evergreen = False
    assert tree.evergreen is None


@pytest.mark.parametrize(
    ("xml", "kib"),
    [
        ("<memory>2048</memory>", 2048),
        ("<memory unit='KiB'>2048</memory>", 2048),
        ("<memory unit='MiB'>2</memory>", 2048),
        ("<memory unit='G'>1</memory>", 1 << 20),
        ("<memory unit='bytes'>4096</memory>", 4),
        ("<memory unit='MB'>1024</memory>", 1_000_000),
    ],
)
def test_memory_is_read_in_any_unit_and_written_in_kib(xml, kib):
    tree = Tree.parse(f"<tree>{xml}</tree>")
    assert tree.memory == kib
    tree.memory = kib + 1
    assert tree.to_xml() == f'<tree>\n  <memory unit="KiB">{kib + 1}</memory>\n</tree>\n'
    tree.memory = None
    assert tree.to_xml() == "<tree />\n"


def test_unknown_xml_survives_parse_change_and_build():
    xml = "<tree kind='oak' mystery='1'><x:odd xmlns:x='urn:x' a='b'>text<x:in/></x:odd><title>t</title><z/></tree>"
    tree = Tree.parse(xml)
    tree.title = "new"
    tree.height = 7
    assert Tree.parse(tree.to_xml()) == Tree.parse(xml.replace(">t<", ">new<").replace(" my", " height='7' my"))
    assert list(tree.node.attrib) == ["kind", "height", "mystery"]


def test_values_that_libvirt_knows_and_we_do_not_are_read_but_not_written():
    tree = Tree.parse("<tree kind='yew'/>")
    assert tree.kind == "yew"
    with pytest.raises(ValueError, match=r"<tree> kind \(\./@kind\): expected one of oak, elm, got 'yew'"):
        tree.kind = "yew"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("title", "a\0b"), ("title", "\x1b[0m"), ("title", "\ud800"), ("title", "\ufffe"), ("title", 7),
        ("height", 0), ("height", "3"), ("height", True), ("height", -1),
        ("deep", "yes"), ("deep", 1), ("memory", 0), ("crown", Leaf()), ("crown", Tree()), ("leaves", [Tree()]),
    ],
)  # fmt: skip
def test_bad_value_is_refused_and_changes_nothing(name, value):
    tree = Tree(title="t", height=2, memory=1, deep=True, crown=Crown(), leaves=[Leaf(name="a")])
    before = tree.copy()
    with pytest.raises(ValueError, match=r"expected|XML cannot hold"):
        setattr(tree, name, value)
    assert tree == before


def test_a_refused_value_leaves_no_empty_parents():
    tree = Tree()
    for name, value in (("serial", "\0"), ("deep", 3), ("memory", -1), ("leaves", [Tree()])):
        with pytest.raises(ValueError):
            setattr(tree, name, value)
    assert tree.to_xml() == "<tree />\n"


def test_markup_in_values_is_escaped():
    evil = "</title><disk/>&amp;\"'<![CDATA["
    tree = Tree(title=evil, title_lang=evil)
    again = Tree.parse(tree.to_xml())
    assert (again.title, again.title_lang, len(again.node)) == (evil, evil, 1)


@given(st.text())
def test_any_text_comes_back_or_is_refused(text):
    tree = Tree()
    try:
        tree.title_lang = text
    except ValueError:
        return
    assert Tree.parse(tree.to_xml()).title_lang == text


def test_child_stays_attached_and_is_replaced_not_added():
    crown = Crown(height=1)
    tree = Tree(crown=crown)
    crown.height = 9
    assert tree.crown is not None
    assert tree.crown.height == 9
    tree.crown = Crown(height=2)
    assert [node.get("height") for node in tree.node] == ["2"]
    tree.crown = None
    assert tree.crown is None


def test_an_elements_own_text():
    leaf = Leaf(name="a", text="green")
    assert leaf.to_xml() == '<leaf name="a">green</leaf>\n'
    leaf.text = None
    assert (leaf.text, leaf.to_xml()) == (None, '<leaf name="a" />\n')


def test_children_are_a_live_list():
    tree = Tree(leaves=[Leaf(name="a"), Leaf(name="b")])
    tree.leaves.append(Leaf(name="d"))
    tree.leaves.insert(2, Leaf(name="c"))
    assert [leaf.name for leaf in tree.leaves] == ["a", "b", "c", "d"]
    tree.leaves[0].name = "A"
    tree.leaves[1] = Leaf(name="B")
    assert [leaf.name for leaf in tree.leaves[:2]] == ["A", "B"]
    del tree.leaves[1:3]
    assert [leaf.name for leaf in tree.leaves] == ["A", "d"]
    tree.leaves = [leaf for leaf in tree.leaves if leaf.name == "d"]
    assert [leaf.name for leaf in tree.leaves] == ["d"]
    tree.leaves.clear()
    assert tree.to_xml() == "<tree />\n"


def test_children_keep_unknown_siblings():
    tree = Tree.parse("<tree><leaves><twig/><leaf name='a'/><bud/></leaves></tree>")
    tree.leaves = [Leaf(name="x"), Leaf(name="y")]
    assert sorted(node.tag for node in tree.node[0]) == ["bud", "leaf", "leaf", "twig"]


def test_subclasses_inherit_properties():
    crown = Crown(shape="round", kind="oak")
    assert crown.to_xml() == '<crown kind="oak" shape="round" />\n'
    assert "shape" not in Tree.PROPERTIES


def test_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="no property 'colour'"):
        Tree(colour="green")


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<tree>", "not XML"),
        ("<bush/>", "expected <tree>, got <bush>"),
        ("<!DOCTYPE tree [<!ENTITY a 'b'>]><tree>&a;</tree>", "DOCTYPE"),
    ],
)
def test_bad_document_is_refused(xml, message):
    with pytest.raises(ValueError, match=message):
        Tree.parse(xml)


def test_equality_ignores_white_space_and_attribute_order():
    assert Tree.parse("<tree kind='a' height='1'>\n <title>t</title></tree>") == Tree.parse(
        "<tree height='1' kind='a'><title>t</title></tree>"
    )
    assert Tree(height=1) != Tree(height=2)
    assert Tree() != "tree"


def test_copy_is_independent():
    tree = Tree(leaves=[Leaf(name="a")])
    other = tree.copy()
    other.leaves[0].name = "b"
    assert tree.leaves[0].name == "a"


def test_converters_read_libvirts_words():
    assert (YES_NO.load("yes"), YES_NO.load("no"), Int().load("0x10"), Int().load(" 12 ")) == (True, False, 16, 12)
