import torch


def fingerprint(where):
    return str(where)


def fingerprint_of(w):
    return ""


def pretrained(kind, where, dtype="float32", device="cpu", new_head=False):
    import transformers

    t = transformers.AutoTokenizer.from_pretrained(where)
    m = getattr(transformers, kind).from_pretrained(where, dtype=getattr(torch, dtype))
    return m.to(device), t


def load_model(where, dtype, device):
    return pretrained("AutoModelForCausalLM", where, dtype, device)
