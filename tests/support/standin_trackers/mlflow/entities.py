"""What the client takes."""


class Metric:
    def __init__(self, key, value, timestamp, step):
        self.values = {"key": key, "value": value, "timestamp": timestamp, "step": step}
