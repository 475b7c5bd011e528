//! The start of the shared server is reported, in a binary of its own: a process has one shared server.

use std::cell::RefCell;

use lockkeeper_testkit::Server;

#[test]
fn the_start_is_reported_once_and_in_order() {
    let steps = RefCell::new(Vec::new());
    let report = |step: &str| steps.borrow_mut().push(step.to_owned());
    let server = Server::shared_with_progress(report);
    let reported = steps.take();
    let (major, port) = (server.major(), server.port());
    if server.is_private() {
        assert_eq!(reported[0], "searching for an installed PostgreSQL …");
        // What was found, after it was fetched with npm where none is installed.
        let found = format!("found PostgreSQL {major} in ");
        let at = reported.len() - 4;
        assert!(reported[at].starts_with(&found), "{reported:?}");
        assert_eq!(
            reported[at + 1..],
            [
                "creating a throw-away cluster …".to_owned(),
                "starting its server …".to_owned(),
                format!("PostgreSQL {major} is ready on port {port}"),
            ]
        );
        assert!(at == 1 || at == 2, "{reported:?}");
    } else {
        assert_eq!(reported, ["connecting to the server of DATABASE_URL …"]);
    }

    let report = |step: &str| panic!("started again: {step}");
    Server::shared_with_progress(report);
}
