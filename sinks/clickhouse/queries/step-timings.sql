-- Every step with its timings, newest task first
SELECT task_id, step_id, capability, agent, attempt, revision, status, groundedness, work_ms, duration_ms, assigned_at
FROM steps
ORDER BY assigned_at DESC, step_id
LIMIT 200
