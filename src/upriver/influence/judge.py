"""temporary"""


def judge(job, sample, say):
    return [{"converged": True} for _ in job.queries.ids]
