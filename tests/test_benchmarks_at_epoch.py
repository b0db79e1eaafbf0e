from benchmarks.at_epoch import chosen, gate_messages, table
from benchmarks.detection import Replay
from benchmarks.detection_cases import DetectionCase, train


def test_what_the_callback_would_note_leads_to_an_epoch():
    case = DetectionCase("wine", "symmetric", 0.1, network="wide", epochs=12, judged_after=(2,), batch=32)
    notes = gate_messages(Replay(case, train(case, None, 0)), 0)
    assert len(notes) == 12
    assert "similarity" not in notes[0]["note"]
    assert 0.5 < notes[1]["note"]["similarity"] < notes[5]["note"]["similarity"] <= 1
    row = {"case": case.name, "seed": 0, "rate": 0.1, "notes": notes}
    epoch, why = chosen(row)
    assert 2 <= epoch <= 8
    row["looks"] = {str(at): {"auroc": 0.9 + 0.008 * (at == 9), "flags": [10, 0.9, 0.5]} for at in range(2, 13)}
    said = table([row])
    assert "within 0.01 of the best epoch in 1 of 1 noisy fits, 0.0080 behind" in said
    assert f"| {epoch} | {why.split(',')[0]} | 0.900 | 0.908 (9) | -0.008 | 10, 0.90/0.50 |" in said
