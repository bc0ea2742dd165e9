"""XML elements as classes whose properties say where they live.

::

    class Rng(Element):
        TAG = "rng"
        model = Attr("./@model", Choice("virtio"))
        rate_bytes = Attr("./rate/@bytes", Int(1))

The element *is* its XML: a property reads and writes the tree in place, so one declaration serves parsing and
building, and whatever nobody declared survives a parse, change and build. ``None`` means absent; assigning it removes
the location and the elements it leaves empty. Elements and attributes come out in the order of declaration, however
they were assigned.

A location is ``./tag/tag/@attribute``, ``./tag/tag`` or ``.``; a step may be pinned to one of several siblings as in
``./entry[@name='serial']``. Values are checked when assigned (``ValueError``), never when parsed: what libvirt says is
taken as it is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar, cast, overload
from xml.etree import ElementTree as ET

from compute_worker.virt.libvirt.xmlvalues import STR, Converter, Int

T = TypeVar("T")
E = TypeVar("E", bound="Element")

_STEP = re.compile(r"(?P<tag>\{[^}]*\}[\w.-]+|[\w.-]+)(?:\[@(?P<key>[\w.-]+)='(?P<value>[^']*)'\])?")


class Step(NamedTuple):
    """One element on the way: its tag, and the attribute that tells it from its siblings."""

    tag: str
    key: str | None = None
    value: str | None = None

    def matches(self, node: ET.Element) -> bool:
        """Whether ``node`` is the one meant."""
        return node.tag == self.tag and (self.key is None or node.get(self.key) == self.value)


class Location(NamedTuple):
    """A parsed location: the elements to walk, and the attribute at the end (``None``: the element itself)."""

    steps: tuple[Step, ...]
    attribute: str | None

    @classmethod
    def parse(cls, path: str) -> Location:
        """Read ``./a/b[@k='v']/@c``; ``ValueError`` when it is anything else."""
        rest = path.removeprefix(".").removeprefix("/")
        steps: list[Step] = []
        while rest and not rest.startswith("@"):
            match = _STEP.match(rest)
            if match is None:
                raise ValueError(f"not a location: {path!r}")
            steps.append(Step(match["tag"], match["key"], match["value"]))
            rest = rest[match.end() :].removeprefix("/")
        return cls(tuple(steps), rest[1:] if rest else None)


class Property(Generic[T]):
    """One declared location of an :class:`Element`; a descriptor that reads ``T | None``."""

    name: str = ""

    def __init__(self, path: str) -> None:
        self.path = path
        self.location = Location.parse(path)

    def __set_name__(self, owner: type[Element], name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type[Element]) -> Self: ...

    @overload
    def __get__(self, instance: Element, owner: type[Element]) -> T | None: ...

    def __get__(self, instance: Element | None, owner: type[Element]) -> Self | T | None:
        return self if instance is None else self._load(instance)

    def __set__(self, instance: Element, value: T | None) -> None:
        try:
            self._store(instance, value)
        except ValueError as exc:
            raise ValueError(f"<{instance.node.tag}> {self.name} ({self.path}): {exc}") from None

    def _load(self, element: Element) -> T | None:
        """The value in the tree, ``None`` when absent."""
        raise NotImplementedError

    def _store(self, element: Element, value: T | None) -> None:
        """Write the value, or remove the location for ``None``."""
        raise NotImplementedError


class Attr(Property[T]):
    """An attribute."""

    @overload
    def __init__(self: Attr[str], path: str) -> None: ...

    @overload
    def __init__(self, path: str, converter: Converter[T]) -> None: ...

    def __init__(self, path: str, converter: Any = STR) -> None:
        super().__init__(path)
        self.converter: Converter[T] = converter
        if self.location.attribute is None:
            raise ValueError(f"{path!r} names no attribute")
        self.attribute: str = self.location.attribute

    def _load(self, element: Element) -> T | None:
        node = element.find(self.location.steps)
        text = None if node is None else node.get(self.attribute)
        return None if text is None else self.converter.load(text)

    def _store(self, element: Element, value: T | None) -> None:
        steps = self.location.steps
        if value is not None:
            text = self.converter.dump(value)
            element.set_attribute(element.make(steps), steps, self.attribute, text)
        elif (node := element.find(steps)) is not None:
            node.attrib.pop(self.attribute, None)
            element.prune(steps)


class Text(Property[T]):
    """The text of an element."""

    @overload
    def __init__(self: Text[str], path: str) -> None: ...

    @overload
    def __init__(self, path: str, converter: Converter[T]) -> None: ...

    def __init__(self, path: str, converter: Any = STR) -> None:
        super().__init__(path)
        self.converter: Converter[T] = converter

    def _load(self, element: Element) -> T | None:
        node = element.find(self.location.steps)
        return None if node is None or node.text is None else self.converter.load(node.text)

    def _store(self, element: Element, value: T | None) -> None:
        if value is not None:
            text = self.converter.dump(value)
            element.make(self.location.steps).text = text
        elif (node := element.find(self.location.steps)) is not None:
            node.text = None
            element.prune(self.location.steps, pinned=True)


class Flag(Property[bool]):
    """An element whose presence is the value: ``True`` or ``None``; ``False`` removes it."""

    def _load(self, element: Element) -> bool | None:
        return True if element.find(self.location.steps) is not None else None

    def _store(self, element: Element, value: bool | None) -> None:
        if value:
            element.make(self.location.steps)
        else:
            element.remove(self.location.steps)


class Kib(Property[int]):
    """An amount of memory in KiB, whatever unit the document has (libvirt's names; none means KiB)."""

    FACTORS: ClassVar[dict[str, int]] = {
        "b": 1, "bytes": 1, "KB": 1000, "k": 1024, "KiB": 1024, "MB": 1000**2, "M": 1024**2, "MiB": 1024**2,
        "GB": 1000**3, "G": 1024**3, "GiB": 1024**3, "TB": 1000**4, "T": 1024**4, "TiB": 1024**4,
    }  # fmt: skip

    def _load(self, element: Element) -> int | None:
        node = element.find(self.location.steps)
        if node is None or node.text is None:
            return None
        return int(node.text) * self.FACTORS[node.get("unit", "KiB")] // 1024

    def _store(self, element: Element, value: int | None) -> None:
        if value is None:
            return element.remove(self.location.steps)
        text = Int(1).dump(value)
        node = element.make(self.location.steps)
        node.text = text
        element.set_attribute(node, self.location.steps, "unit", "KiB")
        return None


class Child(Property[E]):
    """One nested element of its own class. The assigned object stays attached: later changes to it show.

    ``cls`` may be a function that returns the class, for elements that hold their own kind.
    """

    def __init__(self, path: str, cls: type[E] | Callable[[], type[E]]) -> None:
        super().__init__(path)
        self._cls = cls

    @property
    def cls(self) -> type[E]:
        """The class of the nested element."""
        return self._cls if isinstance(self._cls, type) else self._cls()

    def _load(self, element: Element) -> E | None:
        node = element.find(self.location.steps)
        return None if node is None else self.cls.wrap(node)

    def _store(self, element: Element, value: E | None) -> None:
        nodes = [] if value is None else [_expect(value, self.cls, self.location).node]
        element.remove(self.location.steps)
        element.attach(self.location.steps, nodes)


class Children(Property["ElementList[E]"], Generic[E]):
    """All nested elements at a location, as a live list; assigning replaces them all."""

    def __init__(self, path: str, cls: type[E]) -> None:
        super().__init__(path)
        self.cls = cls

    @overload
    def __get__(self, instance: None, owner: type[Element]) -> Self: ...

    @overload
    def __get__(self, instance: Element, owner: type[Element]) -> ElementList[E]: ...

    def __get__(self, instance: Element | None, owner: type[Element]) -> Self | ElementList[E]:
        return self if instance is None else ElementList(instance, self)

    def __set__(self, instance: Element, value: Iterable[E] | None) -> None:
        nodes = [_expect(one, self.cls, self.location).node for one in value or ()]
        instance.remove(self.location.steps)
        instance.attach(self.location.steps, nodes)


class ElementList(MutableSequence[E]):
    """A view of the elements at a location: adding to it adds to the document."""

    def __init__(self, element: Element, prop: Children[E]) -> None:
        self._element = element
        self._prop = prop

    def _nodes(self) -> list[ET.Element]:
        return self._element.find_all(self._prop.location.steps)

    @overload
    def __getitem__(self, index: int) -> E: ...

    @overload
    def __getitem__(self, index: slice) -> MutableSequence[E]: ...

    def __getitem__(self, index: int | slice) -> E | MutableSequence[E]:
        if isinstance(index, slice):
            return [self._prop.cls.wrap(node) for node in self._nodes()[index]]
        return self._prop.cls.wrap(self._nodes()[index])

    def __setitem__(self, index: int | slice, value: Any) -> None:
        elements = list(self)
        elements[index] = value
        self._prop.__set__(self._element, elements)

    def __delitem__(self, index: int | slice) -> None:
        elements = list(self)
        del elements[index]
        self._prop.__set__(self._element, elements)

    def __len__(self) -> int:
        return len(self._nodes())

    def insert(self, index: int, value: E) -> None:
        """Put ``value`` before the element at ``index``."""
        elements = list(self)
        elements.insert(index, value)
        self._prop.__set__(self._element, elements)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))


class Element:
    """Base of all elements. Constructed empty with properties as keyword arguments, or by :meth:`parse`."""

    TAG: ClassVar[str]
    PROPERTIES: ClassVar[dict[str, Property[Any]]] = {}
    _ORDER: ClassVar[dict[tuple[Step, ...], int]] = {}

    node: ET.Element

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        inherited = {name: prop for base in reversed(cls.__mro__) for name, prop in vars(base).items()}
        cls.PROPERTIES = {name: p for name, p in inherited.items() if isinstance(p, Property)}
        cls._ORDER = {}
        for prop in cls.PROPERTIES.values():
            steps, attribute = prop.location
            path = steps if attribute is None else (*steps, Step("@" + attribute))
            for length in range(1, len(path) + 1):
                cls._ORDER.setdefault(path[:length], len(cls._ORDER))

    def __init__(self, **values: Any) -> None:
        self.node = ET.Element(self.TAG)
        for name, value in values.items():
            if name not in self.PROPERTIES:
                raise TypeError(f"<{self.TAG}> has no property {name!r}")
            setattr(self, name, value)

    @classmethod
    def wrap(cls, node: ET.Element) -> Self:
        """The element that ``node`` is; shares it."""
        self = cls.__new__(cls)
        self.node = node
        return self

    @classmethod
    def parse(cls, xml: str) -> Self:
        """Read a document. ``ValueError`` when it is not XML, has another root, or brings a DOCTYPE."""
        if "<!DOCTYPE" in xml:
            raise ValueError(f"<{cls.TAG}>: a DOCTYPE is not accepted")
        try:
            node = ET.fromstring(xml)
        except ET.ParseError as exc:
            raise ValueError(f"<{cls.TAG}>: not XML: {exc}") from None
        if node.tag != cls.TAG:
            raise ValueError(f"expected <{cls.TAG}>, got <{node.tag}>")
        return cls.wrap(node)

    def to_xml(self) -> str:
        """The document as text, indented."""
        node = copy.deepcopy(self.node)
        ET.indent(node)
        return ET.tostring(node, encoding="unicode") + "\n"

    def copy(self) -> Self:
        """An independent copy."""
        return self.wrap(copy.deepcopy(self.node))

    def __eq__(self, other: object) -> bool:
        """Same XML, whatever the white space and the order of attributes."""
        if not isinstance(other, Element):
            return NotImplemented
        return _canonical(self.node) == _canonical(other.node)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {ET.tostring(self.node, encoding='unicode')}>"

    def find(self, steps: tuple[Step, ...]) -> ET.Element | None:
        """The first element at the location."""
        node = self.node
        for step in steps:
            found = next((child for child in node if step.matches(child)), None)
            if found is None:
                return None
            node = found
        return node

    def find_all(self, steps: tuple[Step, ...]) -> list[ET.Element]:
        """All elements at the location, under the first parent that leads to it."""
        parent = self.find(steps[:-1])
        return [] if parent is None else [child for child in parent if steps[-1].matches(child)]

    def make(self, steps: tuple[Step, ...]) -> ET.Element:
        """The element at the location, made with its parents where it is missing."""
        node = self.node
        for depth, step in enumerate(steps):
            found = next((child for child in node if step.matches(child)), None)
            if found is None:
                found = ET.Element(step.tag)
                if step.key is not None and step.value is not None:
                    found.set(step.key, step.value)
                self._insert(node, steps[:depth], found)
            node = found
        return node

    def attach(self, steps: tuple[Step, ...], nodes: list[ET.Element]) -> None:
        """Add ``nodes`` at the location, after those that are there."""
        if nodes:
            parent = self.make(steps[:-1])
            for node in nodes:
                self._insert(parent, steps[:-1], node)

    def remove(self, steps: tuple[Step, ...]) -> None:
        """Remove every element at the location, then the parents that are empty now."""
        for node in self.find_all(steps):
            cast(ET.Element, self.find(steps[:-1])).remove(node)
        self.prune(steps[:-1])

    def prune(self, steps: tuple[Step, ...], *, pinned: bool = False) -> None:
        """Remove the element at the location and its parents while they hold nothing.

        ``pinned``: an attribute that only tells it from its siblings does not count.
        """
        while steps and (node := self.find(steps)) is not None:
            keys = set(node.attrib) - ({steps[-1].key} if pinned else set())
            if keys or len(node) or (node.text or "").strip():
                return
            parent = self.find(steps[:-1])
            if parent is not None:
                parent.remove(node)
            steps = steps[:-1]

    def set_attribute(self, node: ET.Element, steps: tuple[Step, ...], name: str, text: str) -> None:
        """Set one attribute and keep all in the order of declaration, unknown ones last."""
        values = {**node.attrib, name: text}
        unknown = len(self._ORDER)
        node.attrib.clear()
        node.attrib.update(sorted(values.items(), key=lambda kv: self._ORDER.get((*steps, Step("@" + kv[0])), unknown)))

    def _insert(self, parent: ET.Element, above: tuple[Step, ...], node: ET.Element) -> None:
        """Put ``node`` behind the last sibling that is declared before it, or is of its kind."""
        declared = [(path[-1], rank) for path, rank in self._ORDER.items() if path[:-1] == above]

        def rank_of(sibling: ET.Element, unknown: int) -> int:
            return next((rank for step, rank in declared if step.matches(sibling)), unknown)

        rank = rank_of(node, len(self._ORDER))
        ranks = [rank_of(sibling, -1) for sibling in parent]
        place = max((index + 1 for index, other in enumerate(ranks) if 0 <= other <= rank), default=0)
        parent.insert(place, node)


def properties_of(*classes: type[Element]) -> Iterator[tuple[type[Element], Property[Any]]]:
    """Every declared property of the classes."""
    for cls in classes:
        for prop in cls.PROPERTIES.values():
            yield cls, prop


def _expect(value: Element, cls: type[E], location: Location) -> E:
    tag = location.steps[-1].tag
    if not isinstance(value, cls) or value.node.tag != tag:
        raise ValueError(f"expected {cls.__name__} <{tag}>, got {value!r}")
    return value


def _canonical(node: ET.Element) -> str:
    return ET.canonicalize(ET.tostring(node, encoding="unicode"), strip_text=True)
