"""Every method as one row: what it costs against its eager form, and what it learns in equal forwards."""
