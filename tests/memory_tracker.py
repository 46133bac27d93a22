"""A tracker in memory, for tests of what reaches one."""

KEPT: dict = {}
"""{run folder: ({line: points}, {figure: PNG})}; it outlives a run, as a service does."""


class MemoryTracker:
    """A tracker whose points and figures are in `KEPT`."""

    def __init__(self, folder, options):
        self.points, self.figures = KEPT.setdefault(str(folder), ({}, {}))

    def begin(self, points):
        self.points.clear()
        self.points.update(enumerate(points))

    def add(self, number, points):
        assert number not in self.points
        self.points[number] = points

    def images(self, number, step, images):
        self.figures.update(images)

    def close(self, *, failed=False):
        pass
