"""placeholder until the certificate helper reports"""
from dataclasses import dataclass, field
@dataclass
class E:
    content: object=None
    executed: dict=field(default_factory=dict)
def gather(*a): return E()
