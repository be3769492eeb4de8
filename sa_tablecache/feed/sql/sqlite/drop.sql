SELECT json_extract('{{}}', 'tables are still watched: unwatch them before the changelog is dropped')
FROM {schema}.sqlite_master
WHERE type = 'trigger' AND name LIKE 'sa\_tablecache\_%' ESCAPE '\'

DROP TABLE IF EXISTS {schema}.sa_tablecache_changelog

DROP TABLE IF EXISTS {schema}.sa_tablecache_watched

DROP TABLE IF EXISTS {schema}.sa_tablecache_meta
