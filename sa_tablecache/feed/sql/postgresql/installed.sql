SELECT w.schema, w.name, w.definition::text AS definition, r.problem
FROM sa_tablecache.watched AS w
LEFT JOIN sa_tablecache.inspect((
    SELECT coalesce(jsonb_agg(jsonb_build_array(a.schema, a.name)), '[]')
    FROM sa_tablecache.watched AS a
)) AS r ON r.schema = w.schema AND r.name = w.name
ORDER BY w.schema, w.name
