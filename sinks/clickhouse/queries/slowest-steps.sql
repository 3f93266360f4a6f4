-- The steps that took longest, from being assigned to being assessed
SELECT task_id, step_id, capability, agent, attempt, revision, status, work_ms, duration_ms, objective
FROM steps
WHERE isNotNull(duration_ms)
ORDER BY duration_ms DESC, step_id
LIMIT 20
