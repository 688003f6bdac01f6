//! Reads the layers of the configuration: defaults, file, environment, flags.
//!
//! This is the only code that reads the configuration from the environment. Goes out: the merged
//! values, which `check` validates.

use std::fmt;
use std::path::PathBuf;

use config::{Environment, File, FileFormat, Source};

use super::problem::{self, ConfigError};
use super::raw::RawConfig;
use super::settings::Config;

/// The sources of the configuration other than the environment.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// A TOML file.
    pub file: Option<PathBuf>,
    /// Values of flags: dotted key and value.
    pub overrides: Vec<(String, String)>,
}

impl Sources {
    /// Adds the value of a flag, if there is one.
    pub fn set(mut self, key: &str, value: Option<impl fmt::Display>) -> Self {
        self.overrides.extend(value.map(|value| (key.to_owned(), value.to_string())));
        self
    }
}

impl Config {
    /// Reads all layers and validates the result. The error lists every problem.
    pub fn load(sources: &Sources) -> Result<Self, ConfigError> {
        RawConfig::read(sources, ProcessEnvironment::of_process()?)?.check()
    }

    /// [`load`](Self::load) with other defaults for some keys: dotted key and value. Every other
    /// layer takes precedence over them.
    pub fn load_over(defaults: &[(&str, &str)], sources: &Sources) -> Result<Self, ConfigError> {
        RawConfig::read_over(defaults, sources, ProcessEnvironment::of_process()?)?.check()
    }

    /// The defaults with this broker URL and namespace, without reading the environment. For tests,
    /// examples and embedding.
    pub fn with_broker(url: &str, namespace: &str) -> Result<Self, ConfigError> {
        let mut raw = RawConfig::default();
        url.clone_into(&mut raw.broker.url);
        namespace.clone_into(&mut raw.broker.namespace);
        raw.check()
    }
}

impl RawConfig {
    pub(super) fn read(
        sources: &Sources,
        environment: ProcessEnvironment,
    ) -> Result<Self, ConfigError> {
        Self::read_over(&[], sources, environment)
    }

    pub(super) fn read_over(
        defaults: &[(&str, &str)],
        sources: &Sources,
        environment: ProcessEnvironment,
    ) -> Result<Self, ConfigError> {
        let mut builder = config::Config::builder();
        for (key, value) in defaults {
            builder = builder.set_default(*key, *value).map_err(|error| ConfigError::of(&error))?;
        }
        if let Some(file) = &sources.file {
            problem::check_file(file)?;
            let file = File::from(file.as_path()).format(FileFormat::Toml);
            builder = builder.add_source(layer(file)?);
        }
        let all = builder
            .set_override_option("broker.url", environment.amqp_url)
            .and_then(config::ConfigBuilder::<config::builder::DefaultState>::build)
            .map_err(|error| ConfigError::of(&error))?;
        // AMQP_URL takes precedence over the file and not over the environment, hence the two
        // steps.
        let environment =
            environment.variables.prefix("GARENNE").prefix_separator("__").separator("__");
        let mut builder = config::Config::builder().add_source(all).add_source(layer(environment)?);
        for (key, value) in &sources.overrides {
            builder = builder
                .set_override(key, value.as_str())
                .map_err(|error| ConfigError::of(&error))?;
        }
        let all = builder.build().map_err(|error| ConfigError::of(&error))?;
        all.try_deserialize().map_err(|error| ConfigError::of(&error))
    }
}

/// A layer, validated by itself. A later layer would silently replace text in place of a section,
/// and its content would be ignored.
fn layer(source: impl Source + Send + Sync + 'static) -> Result<config::Config, ConfigError> {
    let layer = config::Config::builder().add_source(source).build();
    let layer = layer.map_err(|error| ConfigError::of(&error))?;
    layer.clone().try_deserialize::<RawConfig>().map_err(|error| ConfigError::of(&error))?;
    Ok(layer)
}

/// The variables of the environment. Tests replace them.
pub(super) struct ProcessEnvironment {
    variables: Environment,
    amqp_url: Option<String>,
}

impl ProcessEnvironment {
    pub(super) fn of_process() -> Result<Self, ConfigError> {
        // Checked here, since the error of the library quotes the value.
        for (name, value) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.to_ascii_uppercase().starts_with("GARENNE__") {
                problem::text(&name, value)?;
            }
        }
        let amqp_url = std::env::var_os("AMQP_URL").filter(|url| !url.is_empty());
        let amqp_url = amqp_url.map(|url| problem::text("AMQP_URL", url)).transpose()?;
        Ok(Self { variables: Environment::default(), amqp_url })
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
