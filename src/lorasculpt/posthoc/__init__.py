"""Edits of a finished LoRA, without training: less of it, a sparser one, or one made of several.

    from lorasculpt.posthoc import dare, read, write

    write(dare(read("runs/invoices/adapter"), p=0.5), "invoices-dare", base="path/to/base")

What an edit returns is again an adapter where two factors can hold it (``scale``, ``prune``, ``average``). Where they
cannot (``dare``, ``ties``, ``model_tailor``) it is the update of each layer, and becomes a merged model, or a LoRA that
comes close.
"""

from __future__ import annotations

from .calibrate import calibrate as calibrate
from .edits import Update as Update
from .edits import average as average
from .edits import cosines as cosines
from .edits import dare as dare
from .edits import drop as drop
from .edits import prune as prune
from .edits import scale as scale
from .edits import sign_conflicts as sign_conflicts
from .edits import ties as ties
from .edits import truncate as truncate
from .files import Written as Written
from .files import read as read
from .files import write as write
from .tailor import model_tailor as model_tailor
from .tailor import moments_of as moments_of
from .tailor import tailor as tailor
