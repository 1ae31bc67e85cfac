import traceback, os
import tests.runtime.test_zero as tz
import tests.runtime.test_ranks_run as tr
from tests.runtime.test_zero import shared, make, place
old=tr.execute
def ex(*a,**k):
    try: return old(*a,**k)
    except BaseException:
        open(f"/tmp/dbg-{os.environ['RANK']}","w").write(traceback.format_exc()); raise
def test_one(shared, monkeypatch):
    monkeypatch.setattr(tr,"execute",ex)
    tz.test_ranks_under_deepspeed_train_as_one_process_does(shared, tz.CASES[int(os.environ["CASE"])])
