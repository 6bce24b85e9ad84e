"""Video as a stream: generations that go on for as long as anyone watches, on any number of
devices.
"""
