"""Latencies are medians of rounds in turn, and a report keeps sizes, bit operations and latency apart."""

import itertools

import pytest
import torch
from torch import nn

from modules.quantization.attachment import attach_quantizers, set_bits
from modules.quantization.latency import deployment_report, measure_latency, network_bops, processor


def test_medians_of_rounds_in_turn():
    calls, time = [], [0.0]
    long = itertools.cycle([0.004, 0.002, 0.1])

    def work(name, seconds):
        calls.append(name)
        time[0] += next(long) if seconds is None else seconds

    sessions = {"a": lambda: work("a", None), "b": lambda: work("b", 0.001)}
    found = measure_latency(sessions, rounds=9, clock=lambda: time[0])
    assert found == pytest.approx({"a": 4.0, "b": 1.0})
    assert len(calls) == 2 * (9 + 3)
    assert {tuple(calls[place : place + 2]) for place in range(0, 24, 2)} == {("a", "b"), ("b", "a")}


def test_bit_operations_are_those_of_a_count_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(72, 5))
    attach_quantizers(network, ["0", "2"])
    set_bits(network, {"0": 4}, {"0": 8})
    network(torch.randn(2, 3, 8, 8))  # ranges of the inputs
    by_hand = 36 * 4 * 3 * 9 * 4 * 8 + 36 * 2 * 4 * 32 * 32  # the linear layer has no quantizer
    assert network_bops(network, torch.zeros(1, 3, 8, 8)) == pytest.approx(by_hand / 1e9)


def test_a_report_keeps_its_numbers_apart(tmp_path):
    network = nn.Sequential(nn.Linear(64, 64))
    attach_quantizers(network, ["0"])
    set_bits(network, {"0": 3})
    file = tmp_path / "model"
    file.write_bytes(bytes(2**20 // 4))
    report = deployment_report(network, {"packed": file})
    assert report["packed_weights_mib"] == pytest.approx(64 * 64 * 3 / 8 / 2**20, abs=1e-4)
    assert report["files_mib"] == {"packed": 0.25}
    assert not report.keys() & {"bops_g", "latency_ms"}
    assert "No kernel here computes in fewer than 8 bits" in report["note"]
    report = deployment_report(network, {}, bops_g=1.25, latency_ms={"int8": 3.00049})
    assert (report["bops_g"], report["latency_ms"]) == (1.25, {"int8": 3.0})
    assert processor() in report["latency_of"]
