SET @sa_tablecache_sql = IF(
    EXISTS (
        SELECT 1 FROM information_schema.triggers
        WHERE event_object_schema = DATABASE() AND LEFT(trigger_name, 14) = 'sa_tablecache_'
    ),
    'SELECT `tables are still watched: unwatch them before the changelog is dropped`',
    'DO 0'
)

PREPARE sa_tablecache_check FROM @sa_tablecache_sql

EXECUTE sa_tablecache_check

DEALLOCATE PREPARE sa_tablecache_check

DROP TABLE IF EXISTS sa_tablecache_changelog

DROP TABLE IF EXISTS sa_tablecache_watched

DROP TABLE IF EXISTS sa_tablecache_meta
