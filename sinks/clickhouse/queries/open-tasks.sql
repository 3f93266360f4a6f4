-- Tasks without an outcome, oldest first
SELECT task_id, priority, status, submitted_at, steps, objective
FROM tasks
WHERE isNull(finished_at)
ORDER BY submitted_at, task_id
LIMIT 200
